"""The scales of batch norms, without the training of network slimming (Liu et al., ICCV 2017, §3).

I_u = mean over the batch norms that the channel passes of |γ|
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastprune.methods.contract import Task
from fastprune.methods.criteria.unit_values import GroupConfig, unit_values
from fastprune.methods.scores.filters import require_batch_norms, unit_batch_norms
from fastprune.methods.scores.ranking import RANKINGS, Ranking, ScoreMethod
from fastprune.options import option


@dataclass(frozen=True)
class BNScaleConfig(GroupConfig):
    """Options of the scales."""

    ranking: Ranking = option("global", RANKINGS)


class BNScale(ScoreMethod):
    """Keep the channels with the largest scales; channels that pass no batch norm stay."""

    name = "bn_scale"
    paper = "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"
    Config: ClassVar[type[Any]] = BNScaleConfig
    config: BNScaleConfig

    def prunable(self, task: Task) -> Tensor:
        """Return the units of the option ``groups`` that pass a batch norm with a scale.

        Raises:
            ValueError: if there are none.
        """
        return require_batch_norms(task.graph, task.model, super().prunable(task), self.name)

    def scores(self, task: Task) -> Tensor:
        """Return the mean |γ| of each unit."""
        names = {f"{norm.name}.weight" for norm in unit_batch_norms(task.graph, task.model)}
        return unit_values(
            task.graph, task.model, lambda name, w: w.abs() if name in names else None, reduction=self.config.reduction
        )
