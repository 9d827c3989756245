"""Network slimming (Liu et al., ICCV 2017): an ℓ1 penalty on the scales of batch norms, then pruning by scale.

    loss = cross-entropy + λ Σ |γ|          by its subgradient λ sign(γ), as in the paper (§3, eq. 1)

Afterwards all channels of the network compete by |γ|. For a channel that passes several batch norms (a residual stream,
an expansion and its depthwise convolution), the mean of their |γ| counts. Channels that pass none are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.graph.structure import belong_to
from fastprune.methods.contract import Task
from fastprune.methods.scores.filters import require_batch_norms, unit_batch_norms
from fastprune.methods.scores.trained import TrainedConfig, TrainedMethod
from fastprune.options import option
from fastprune.training.phases import Metrics


@dataclass(frozen=True)
class SlimmingConfig(TrainedConfig):
    """Options of slimming; the defaults are the paper's for CIFAR-10 (§4.2)."""

    penalty: float = option(1e-4, "λ of the ℓ1 penalty; the paper takes 1e-5 for ResNets", minimum=0.0)
    batch_size: int = option(64, "samples per step over all processes together", minimum=1)
    nesterov: bool = option(True, "use Nesterov's momentum")


class Slimming(TrainedMethod):
    """Train under an ℓ1 penalty on the scales of batch norms, then remove the channels with the smallest scales."""

    name = "slimming"
    paper = "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"
    comparable = True
    Config: ClassVar[type[Any]] = SlimmingConfig
    config: SlimmingConfig

    def setup(self, task: Task) -> None:
        """Create the optimiser.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
            ValueError: if no prunable channel passes a batch norm.
        """
        super().setup(task)
        self.penalised = [
            (norm.module.weight, self.are_prunable(norm.units).to(norm.module.weight))
            for norm in unit_batch_norms(task.graph, task.model)
        ]

    def prunable(self, task: Task) -> Tensor:
        """Return the units of the option ``groups`` that pass a batch norm with a scale."""
        return require_batch_norms(task.graph, task.model, super().prunable(task), self.name)

    def are_prunable(self, units: Tensor) -> Tensor:
        """Return which of ``units`` (-1 = none) may be pruned, bool."""
        return belong_to(units, self.prunable_units)

    def before_update(self, task: Task) -> None:
        """Add λ sign(γ) to the gradients of the scales."""
        for weight, prunable in self.penalised:
            if weight.grad is not None:
                weight.grad.addcmul_(weight.detach().sign(), prunable, value=self.config.penalty)

    def after_epoch(self, task: Task) -> Metrics:
        """Report the fraction of the penalised scales below 1e-3."""
        small = sum(float((weight.detach().abs() < 1e-3).float() @ prunable) for weight, prunable in self.penalised)
        return {"small_scales": small / max(1.0, sum(float(prunable.sum()) for _, prunable in self.penalised))}

    def scores(self, task: Task) -> Tensor:
        """Return the mean |γ| of the batch norms that each unit passes; 0 where it passes none."""
        sums, counts = torch.zeros(2, task.graph.num_units, dtype=torch.float64)
        for norm in unit_batch_norms(task.graph, task.model):
            passes = norm.units >= 0
            scales = norm.module.weight.detach().cpu().double().abs()[passes]
            sums.index_add_(0, norm.units[passes], scales)
            counts.index_add_(0, norm.units[passes], torch.ones_like(scales))
        means: Tensor = sums / counts.clamp(min=1)
        return means
