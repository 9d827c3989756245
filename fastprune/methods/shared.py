"""Names of the wings below that plugins import from ``fastprune.methods``."""

from fastprune.graph.interior import interior_units
from fastprune.options import OptionInfo, option
from fastprune.training.phases import Metrics, Phase

__all__ = ["Metrics", "OptionInfo", "Phase", "interior_units", "option"]
