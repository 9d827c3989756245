from . import data, engine, graph, methods, models, ops, planning, reference, surgery
from .data import UserData
from .finetuning import evaluate, finetune
from .graph import ChannelGraph, Cost, TraceError, trace
from .graph.plan import PlanError, PruningPlan
from .planning.budget import Budget, BudgetError, Conditions
from .planning.limits import LimitError, Limits
from .pruning import PruningResult, prune
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
    "PlanError",
    "PruningPlan",
    "PruningResult",
    "RewrittenNetwork",
    "SurgeryError",
    "TraceError",
    "UserData",
    "apply",
    "data",
    "engine",
    "evaluate",
    "finetune",
    "graph",
    "masked",
    "methods",
    "models",
    "ops",
    "planning",
    "prune",
    "prune_in_steps",
    "reference",
    "slice_optimizer",
    "surgery",
    "trace",
    "verify",
]
