"""Group norm, the importance of DepGraph (Fang et al., CVPR 2023, §3.3): all weights that go with a channel count.

I_u = mean over the tensors of the unit of Σ_w |w|^p            filters, columns that read it, scales of batch norms
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastprune.methods.contract import Task
from fastprune.methods.criteria.unit_values import GroupConfig, unit_values
from fastprune.methods.scores.ranking import ScoreMethod
from fastprune.options import option


@dataclass(frozen=True)
class GroupNormConfig(GroupConfig):
    """Options of the group norm."""

    p: float = option(2.0, "the power of the weights", above=0.0)


class GroupNorm(ScoreMethod):
    """Keep the channels with the largest weights, those that read the channel among them."""

    name = "group_norm"
    paper = "Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023"
    Config: ClassVar[type[Any]] = GroupNormConfig
    config: GroupNormConfig

    def scores(self, task: Task) -> Tensor:
        """Return the mean of Σ |w|^p over the tensors of each unit."""
        config = self.config
        return unit_values(task.graph, task.model, lambda _, w: w.abs().pow(config.p), reduction=config.reduction)
