from . import data, engine, graph, methods, models, ops, planning, reference, surgery
from .calibrating import calibrate
from .data import UserData
from .engine.loggers import Logger
from .finetuning import evaluate, finetune
from .graph import ChannelGraph, Cost, TraceError
from .graph.plan import PlanError, PruningPlan
from .planning.budget import Budget, BudgetError, Conditions
from .planning.limits import LimitError, Limits
from .pruning import PruningResult, prune
from .recovery import compensate
from .report.compare import Comparison, compare
from .runs import load
from .sensitivity import Sensitivity, sensitivity
from .shipping import ExportedFile, ExportError, export, from_pretrained, push_to_hub, save_pretrained
from .steps import prune_in_steps
from .surgery import SurgeryError, apply, masked, slice_optimizer, trace, verify
from .surgery.rewritten import RewrittenNetwork

__version__: str

__all__ = [
    "Budget",
    "BudgetError",
    "ChannelGraph",
    "Comparison",
    "Conditions",
    "Cost",
    "ExportError",
    "ExportedFile",
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
    "UserData",
    "apply",
    "calibrate",
    "compare",
    "compensate",
    "data",
    "engine",
    "evaluate",
    "export",
    "finetune",
    "from_pretrained",
    "graph",
    "load",
    "masked",
    "methods",
    "models",
    "ops",
    "planning",
    "prune",
    "prune_in_steps",
    "push_to_hub",
    "reference",
    "save_pretrained",
    "sensitivity",
    "slice_optimizer",
    "surgery",
    "trace",
    "verify",
]
