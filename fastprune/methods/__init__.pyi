from .contract import Method, Task, TaskData
from .criteria.calibrated import CalibratedConfig, CalibratedMethod
from .plugins import MethodInfo, PluginError, PluginWarning
from .registry import available, broken, configure, load
from .scores.filters import unit_filters, unit_norms
from .scores.ranking import KeepConfig, RankingConfig, ScoreMethod
from .shared import Metrics, OptionInfo, Phase, interior_units, option

__all__ = [
    "CalibratedConfig",
    "CalibratedMethod",
    "KeepConfig",
    "Method",
    "MethodInfo",
    "Metrics",
    "OptionInfo",
    "Phase",
    "PluginError",
    "PluginWarning",
    "RankingConfig",
    "ScoreMethod",
    "Task",
    "TaskData",
    "available",
    "broken",
    "configure",
    "interior_units",
    "load",
    "option",
    "unit_filters",
    "unit_norms",
]
