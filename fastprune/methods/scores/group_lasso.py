"""Group lasso on channels (Wen et al., NeurIPS 2016): train with a penalty that carries whole channels to zero.

    loss = cross-entropy + λ Σ_u √|u| ‖W_u‖₂           W_u: the filter of channel u, scale and shift of its batch norm

by proximal steps: after each step of the optimiser with learning rate η, W_u ← W_u max(0, 1 − ηλ√|u| / ‖W_u‖). All
channels are penalised, whether they stay or not; that is what partial regularisation (SANP) does away with.
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

MAKERS: tuple[Role, ...] = ("out", "depthwise", "channel")
"""The parameters that make a channel: its filters, batch norm's scale and shift, biases."""


@dataclass(frozen=True)
class GroupLassoConfig(TrainedConfig):
    """Options of group lasso."""

    penalty: float | None = option(
        None,
        "λ; none = twice the λ that would, without cross-entropy, carry the channels that the budget would take now to "
        "zero by the end",
        minimum=0.0,
    )


class GroupLasso(TrainedMethod):
    """Train under a group lasso on all channels, and remove those whose weights have become smallest."""

    name = "group_lasso"
    paper = "Wen et al., Learning Structured Sparsity in Deep Neural Networks, NeurIPS 2016"
    comparable = True
    Config: ClassVar[type[Any]] = GroupLassoConfig
    config: GroupLassoConfig

    def setup(self, task: Task) -> None:
        """Make the optimiser and the table of all channels.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
        """
        super().setup(task)
        self.table = unit_table(task.graph, task.model, MAKERS, self.may_go)
        self.roots = self.table.sizes.double().sqrt()
        self.penalty = self.automatic(task) if self.config.penalty is None else self.config.penalty
        self.strength = (self.penalty * self.roots).to(self.table.device, self.table.dtype)

    def prunable(self, task: Task) -> Tensor:
        """The units of the option ``groups`` that are not frozen: without a penalty they cannot be compared."""
        parameters = dict(task.model.named_parameters(remove_duplicate=False))
        trained = torch.zeros(task.graph.num_units, dtype=torch.bool)
        for piece in task.graph.slices:
            if piece.role in MAKERS and piece.tensor in parameters and parameters[piece.tensor].requires_grad:
                trained[piece.units[piece.units >= 0]] = True
        return super().prunable(task) & trained

    def automatic(self, task: Task) -> float:
        """The λ of ``penalty=none``."""
        scores = self.scores(task)
        gone = self.may_go & ~fit(task.graph, task.budget, scores, prunable=self.may_go, limits=task.limits)
        return 2 * float(scores[gone].max()) / max(self.training.remaining_rates, 1e-12)

    def after_update(self, task: Task, rate: float) -> None:
        """The proximal step."""
        group_prox_(self.table, rate * self.strength)

    def after_epoch(self, task: Task) -> Metrics:
        """The part of the penalised channels that is zero."""
        return {"zero_channels": float((self.table.norms().cpu()[self.may_go] == 0).float().mean())}

    def scores(self, task: Task) -> Tensor:
        """‖W_u‖ / √|u|, the root mean square of a channel's weights."""
        return self.table.norms().cpu().double() / self.roots.clamp(min=1)

    def results(self) -> Metrics:
        """The λ that was used."""
        return {"penalty": self.penalty}

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state and λ."""
        return {**super().state_dict(), "penalty": self.penalty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        super().load_state_dict(state)
        self.penalty = float(state["penalty"])
        self.strength = (self.penalty * self.roots).to(self.strength)
