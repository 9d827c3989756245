"""Channel pruning of convolutional networks for PyTorch: exact, fast, by any method.

>>> import torch, fastprune as fp
>>> model = fp.models.create("resnet20")
>>> result = fp.prune(model, torch.zeros(1, 3, 32, 32), method="l1", budget="flops=0.5")
>>> result.metrics["macs"]["planned"] <= 0.5 * result.metrics["macs"]["full"]
True
"""

from importlib.metadata import version

from fastprune import models, ops, reference
from fastprune.graph import ChannelGraph, Cost, TraceError, trace
from fastprune.graph.plan import PlanError, PruningPlan
from fastprune.planning.budget import Budget, BudgetError, Conditions
from fastprune.planning.limits import LimitError, Limits
from fastprune.pruning import PruningResult, prune
from fastprune.steps import prune_in_steps
from fastprune.surgery import SurgeryError, apply, masked, slice_optimizer, verify
from fastprune.surgery.rewritten import RewrittenNetwork

__version__ = version("fastprune")

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
    "apply",
    "masked",
    "models",
    "ops",
    "prune",
    "prune_in_steps",
    "reference",
    "slice_optimizer",
    "trace",
    "verify",
]
