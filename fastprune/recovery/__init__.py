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
from fastprune.recovery.options import Choice, Recovery
from fastprune.recovery.other_graph import plan_in
from fastprune.recovery.statistics import has_batch_norms

__all__ = [
    "CALIBRATION_IMAGES",
    "COMPENSATIONS",
    "Choice",
    "Compensation",
    "How",
    "Recovery",
    "calibration_inputs",
    "compensate",
    "compensate_weights",
    "has_batch_norms",
    "plan_in",
    "require_kind",
]
