"""FPGM (He et al., CVPR 2019): filters near the geometric median of their layer can be replaced by the others.

I_u = Σ over the layers that make u Σ_j ‖w_u − w_j‖_p            over the filters j of the layer  (eq. 6)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.methods.contract import Task
from fastprune.methods.scores.filters import unit_filters
from fastprune.methods.scores.ranking import RankingConfig, ScoreMethod
from fastprune.options import option


@dataclass(frozen=True)
class FPGMConfig(RankingConfig):
    """Options of FPGM."""

    p: float = option(2.0, "the norm of the distances between filters", minimum=1.0)


class FPGM(ScoreMethod):
    """Keep the filters that lie farthest from all others of their layer."""

    name = "fpgm"
    paper = "He et al., Filter Pruning via Geometric Median for Deep CNNs Acceleration, CVPR 2019"
    Config: ClassVar[type[Any]] = FPGMConfig
    config: FPGMConfig

    def scores(self, task: Task) -> Tensor:
        """Return the sum of each filter's distances to the others."""
        scores = torch.zeros(task.graph.num_units, dtype=torch.float64)
        for group in task.graph.groups:
            for filters in unit_filters(task.graph, task.model, group):
                w = filters.cpu().double()
                scores[group.units] += torch.cdist(w, w, p=self.config.p).sum(1)
        return scores
