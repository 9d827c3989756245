"""Pruning methods: the contract, the registry and what plugins build on."""

from fastprune.graph.interior import interior_units
from fastprune.methods.contract import Method, Task, TaskData
from fastprune.methods.registry import MethodInfo, PluginError, PluginWarning, available, broken, configure, load
from fastprune.methods.scores.filters import unit_filters, unit_norms
from fastprune.methods.scores.ranking import KeepConfig, RankingConfig, ScoreMethod
from fastprune.options import OptionInfo, option
from fastprune.training.phases import Metrics, Phase

__all__ = [
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
