"""Soft filter pruning (He et al., IJCAI 2018): each epoch ends by setting the smallest filters to zero.

In every layer the same fraction of filters, those of the smallest ℓ2 norm, is set to zero, as many as the budget
requires. They keep training and can grow back in the next epoch. The choice after the last epoch is the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastprune.graph.structure import belong_to
from fastprune.methods.contract import Task
from fastprune.methods.scores.filters import unit_norms
from fastprune.methods.scores.trained import TrainedConfig, TrainedMethod
from fastprune.options import option
from fastprune.training.phases import Metrics


@dataclass(frozen=True)
class SoftConfig(TrainedConfig):
    """Options of soft filter pruning; the defaults are the paper's for trained networks on CIFAR-10 (§4.1)."""

    epochs: int = option(200, "passes over the training set", minimum=0)
    lr: float = option(0.01, "largest learning rate; the paper has 0.1 for training from scratch", minimum=0.0)
    weight_decay: float = option(5e-4, "L2 penalty", minimum=0.0)
    nesterov: bool = option(True, "use Nesterov's momentum")
    milestones: tuple[float, ...] = option(
        (0.3, 0.6, 0.8), "epochs of the drops, or fractions of all epochs if below 1", minimum=0.0
    )
    gamma: float = option(0.2, "factor of the learning rate at each drop", above=0.0)
    ranking: Literal["local", "global"] = option(
        "local", "local: keep the same fraction of every group, as in the paper; global: all channels compete"
    )


class Soft(TrainedMethod):
    """Train while the filters that would be pruned are set to zero once an epoch and may grow again."""

    name = "soft"
    paper = "He et al., Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018"
    Config: ClassVar[type[Any]] = SoftConfig
    config: SoftConfig

    def after_epoch(self, task: Task) -> Metrics:
        """Set the filters to zero that the current plan would remove."""
        closed = ~self.plan(task).mask.bool()
        parameters = dict(task.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for piece in task.graph.slices:
                weight = parameters.get(piece.tensor)
                if piece.role in ("out", "depthwise") and weight is not None and weight.requires_grad:
                    places = belong_to(piece.units, closed).nonzero().flatten()
                    weight.index_fill_(piece.dim, places.to(weight.device), 0.0)
        return {"zero_channels": float(closed.float().mean())}

    def scores(self, task: Task) -> Tensor:
        """Return ‖filters‖₂ of each unit."""
        return unit_norms(task.graph, task.model, p=2)
