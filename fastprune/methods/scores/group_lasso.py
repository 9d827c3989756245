"""Group lasso on channels (Wen et al., NeurIPS 2016): train with a penalty that shrinks whole channels to zero.

    loss = cross-entropy + λ Σ_u √|u| ‖W_u‖₂           W_u: the filter of channel u, scale and shift of its batch norm

After each step of the optimiser with learning rate η comes the proximal step W_u ← W_u max(0, 1 − ηλ√|u| / ‖W_u‖). It
penalises all channels, also those that will be kept; partial regularisation (SANP) spares these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.graph.structure import Role
from fastprune.methods.contract import Task
from fastprune.methods.scores.filters import unit_table
from fastprune.methods.scores.trained import TrainedConfig, TrainedMethod
from fastprune.ops import group_prox_
from fastprune.options import option
from fastprune.planning.fitting import fit
from fastprune.training.phases import Metrics

PRODUCERS: tuple[Role, ...] = ("out", "depthwise", "channel")
"""Roles of the parameters that make a channel: filters, biases, scale and shift of batch norms."""


@dataclass(frozen=True)
class GroupLassoConfig(TrainedConfig):
    """Options of group lasso."""

    penalty: float | None = option(
        None,
        "λ of the group lasso; none = twice the value that would shrink the channels that the budget would remove at "
        "the start to zero by the end of a training without cross-entropy",
        minimum=0.0,
    )


class GroupLasso(TrainedMethod):
    """Train under a group lasso on all channels, then remove those with the smallest weights."""

    name = "group_lasso"
    paper = "Wen et al., Learning Structured Sparsity in Deep Neural Networks, NeurIPS 2016"
    comparable = True
    Config: ClassVar[type[Any]] = GroupLassoConfig
    config: GroupLassoConfig

    def setup(self, task: Task) -> None:
        """Create the optimiser and the table of all channels.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
        """
        super().setup(task)
        self.table = unit_table(task.graph, task.model, PRODUCERS, self.prunable_units)
        self.roots = self.table.sizes.double().sqrt()
        self.penalty = self.find_penalty(task) if self.config.penalty is None else self.config.penalty
        self.strength = (self.penalty * self.roots).to(self.table.device, self.table.dtype)

    def prunable(self, task: Task) -> Tensor:
        """Return the units of the option ``groups`` that train: frozen ones take no penalty and have no rank."""
        parameters = dict(task.model.named_parameters(remove_duplicate=False))
        trained = torch.zeros(task.graph.num_units, dtype=torch.bool)
        for piece in task.graph.slices:
            if piece.role in PRODUCERS and piece.tensor in parameters and parameters[piece.tensor].requires_grad:
                trained[piece.units[piece.units >= 0]] = True
        return super().prunable(task) & trained

    def find_penalty(self, task: Task) -> float:
        """Return the λ of ``penalty=none``."""
        scores = self.scores(task)
        pruned = self.prunable_units & ~fit(
            task.graph, task.budget, scores, prunable=self.prunable_units, limits=task.limits
        )
        return 2 * float(scores[pruned].max()) / max(self.training.remaining_rates, 1e-12)

    def after_update(self, task: Task, rate: float) -> None:
        """Take the proximal step."""
        group_prox_(self.table, rate * self.strength)

    def after_epoch(self, task: Task) -> Metrics:
        """Report the fraction of the penalised channels that is zero."""
        return {"zero_channels": float((self.table.norms().cpu()[self.prunable_units] == 0).float().mean())}

    def scores(self, task: Task) -> Tensor:
        """Return ‖W_u‖ / √|u|, the root mean square of each channel's weights."""
        return self.table.norms().cpu().double() / self.roots.clamp(min=1)

    def results(self) -> Metrics:
        """Report λ."""
        return {"penalty": self.penalty}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state and λ."""
        return {**super().state_dict(), "penalty": self.penalty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state)
        self.penalty = float(state["penalty"])
        self.strength = (self.penalty * self.roots).to(self.strength)
