"""Recovery of accuracy without training: what the removed channels gave is restored from those that stay."""

from fastprune.recovery.compensation import COMPENSATIONS, Compensation, compensate, compensate_weights

__all__ = ["COMPENSATIONS", "Compensation", "compensate", "compensate_weights"]
