"""Recovery of accuracy without training: what the removed channels gave is restored from those that stay."""

from fastprune.recovery.calibration import calibration_inputs
from fastprune.recovery.compensation import (
    CALIBRATION_IMAGES,
    COMPENSATIONS,
    Compensation,
    How,
    compensate,
    compensate_weights,
    require_kind,
)

__all__ = [
    "CALIBRATION_IMAGES",
    "COMPENSATIONS",
    "Compensation",
    "How",
    "calibration_inputs",
    "compensate",
    "compensate_weights",
    "require_kind",
]
