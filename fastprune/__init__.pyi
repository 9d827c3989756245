from . import data, engine, graph, methods, models, ops, planning, reference, surgery
from .engine.loggers import Logger
from .graph import ChannelGraph, Cost, TraceError, trace
from .graph.plan import PlanError, PruningPlan
from .planning.budget import Budget, BudgetError, Conditions
from .planning.limits import LimitError, Limits
from .pruning import PruningResult, prune
from .sensitivity import Sensitivity, sensitivity
from .steps import prune_in_steps
from .surgery import SurgeryError, apply, masked, slice_optimizer, verify
from .surgery.rewritten import RewrittenNetwork

__version__: str

__all__ = [
    "Budget",
    "BudgetError",
    "ChannelGraph",
    "Conditions",
    "Cost",
    "LimitError",
    "Limits",
    "Logger",
    "PlanError",
    "PruningPlan",
    "PruningResult",
    "RewrittenNetwork",
    "Sensitivity",
    "SurgeryError",
    "TraceError",
    "apply",
    "data",
    "engine",
    "graph",
    "masked",
    "methods",
    "models",
    "ops",
    "planning",
    "prune",
    "prune_in_steps",
    "reference",
    "sensitivity",
    "slice_optimizer",
    "surgery",
    "trace",
    "verify",
]
