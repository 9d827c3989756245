"""LAMP (Lee et al., ICLR 2021), for channels: a score that says how much of what is left a unit is.

    L_u = I_u / Σ_{v: I_v ≥ I_u} I_v            over the units v of the group, I the group norm with p = 2  (eq. 3)

The best unit of each group scores 1, so that no group goes as a whole, and the scores compare across groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.methods.contract import Task
from fastprune.methods.criteria.unit_values import GroupConfig, unit_values
from fastprune.methods.scores.ranking import RANKINGS, Ranking, ScoreMethod
from fastprune.options import option


@dataclass(frozen=True)
class LAMPConfig(GroupConfig):
    """Options of LAMP."""

    ranking: Ranking = option("global", RANKINGS)


class LAMP(ScoreMethod):
    """Keep the channels with the largest part of what would be left of their group."""

    name = "lamp"
    paper = "Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021"
    comparable = True
    Config: ClassVar[type[Any]] = LAMPConfig
    config: LAMPConfig

    def scores(self, task: Task) -> Tensor:
        """Return the LAMP score of each unit."""
        norms = unit_values(task.graph, task.model, lambda _, w: w.square(), reduction=self.config.reduction)
        scores = torch.empty_like(norms)
        for group in task.graph.groups:
            order = norms[group.units].argsort(descending=True, stable=True)
            best_first = norms[group.units][order]
            scores[group.start + order] = best_first / best_first.cumsum(0).clamp(min=1e-300)
        return scores
