"""Network slimming (Liu et al., ICCV 2017): an ℓ1 penalty on the scales of batch norm, then a cut.

    loss = cross-entropy + λ Σ |γ|          by its subgradient λ sign(γ), as in the paper (§3, eq. 1)

Afterwards the channels of the whole network compete by |γ|. Where a channel passes several batch norms (a residual
stream, an expansion and its depthwise convolution), the mean of their |γ| counts. Channels that pass none stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.graph.structure import belong_to
from fastprune.methods.contract import Task
from fastprune.methods.scores.filters import unit_batch_norms
from fastprune.methods.scores.trained import TrainedConfig, TrainedMethod
from fastprune.options import option
from fastprune.training.phases import Metrics


@dataclass(frozen=True)
class SlimmingConfig(TrainedConfig):
    """Options of slimming; the defaults are the paper's for CIFAR-10 (§4.2)."""

    penalty: float = option(1e-4, "λ of the ℓ1 penalty; the paper takes 1e-5 for ResNets", minimum=0.0)
    batch_size: int = option(64, "samples per step over all processes together", minimum=1)
    nesterov: bool = option(True, "Nesterov's momentum")


class Slimming(TrainedMethod):
    """Let an ℓ1 penalty on the scales of batch norm say which channels can go, while the network trains."""

    name = "slimming"
    paper = "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"
    comparable = True
    Config: ClassVar[type[Any]] = SlimmingConfig
    config: SlimmingConfig

    def setup(self, task: Task) -> None:
        """Make the optimiser.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
            ValueError: for a model without batch norms that prunable channels pass.
        """
        super().setup(task)
        self.penalised = [
            (norm.module.weight, self.among(norm.units).to(norm.module.weight))
            for norm in unit_batch_norms(task.graph, task.model)
        ]

    def prunable(self, task: Task) -> Tensor:
        """The units of the option ``groups`` that pass a batch norm with a scale."""
        passes = torch.zeros(task.graph.num_units, dtype=torch.bool)
        for norm in unit_batch_norms(task.graph, task.model):
            passes[norm.units[norm.units >= 0]] = True
        may_go = super().prunable(task) & passes
        if not bool(may_go.any()):
            raise ValueError("slimming: no prunable channel passes a batch norm with a scale; choose another method")
        return may_go

    def among(self, units: Tensor) -> Tensor:
        """Which of ``units`` (-1 = none) may go, bool."""
        return belong_to(units, self.may_go)

    def before_update(self, task: Task) -> None:
        """Add λ sign(γ) to the gradients of the scales."""
        for weight, among in self.penalised:
            if weight.grad is not None:
                weight.grad.addcmul_(weight.detach().sign(), among, value=self.config.penalty)

    def after_epoch(self, task: Task) -> Metrics:
        """The part of the penalised scales that is nearly 0."""
        small = sum(float((weight.detach().abs() < 1e-3).float() @ among) for weight, among in self.penalised)
        return {"small_scales": small / max(1.0, sum(float(among.sum()) for _, among in self.penalised))}

    def scores(self, task: Task) -> Tensor:
        """The mean |γ| of the batch norms that each unit passes; 0 where there is none."""
        sums, counts = torch.zeros(2, task.graph.num_units, dtype=torch.float64)
        for norm in unit_batch_norms(task.graph, task.model):
            passes = norm.units >= 0
            scales = norm.module.weight.detach().cpu().double().abs()[passes]
            sums.index_add_(0, norm.units[passes], scales)
            counts.index_add_(0, norm.units[passes], torch.ones_like(scales))
        means: Tensor = sums / counts.clamp(min=1)
        return means
