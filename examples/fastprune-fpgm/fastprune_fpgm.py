"""Filter Pruning via Geometric Median (He et al., CVPR 2019): filters that others can replace go first."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune.methods import RankingConfig, ScoreMethod, Task, option, unit_filters


@dataclass(frozen=True)
class FPGMConfig(RankingConfig):
    """The options of every score-based method, and the norm of the distances."""

    p: float = option(2.0, "norm of the distances between filters; the paper's is 2", minimum=1.0)


class FPGM(ScoreMethod):
    """Remove the filters nearest to the geometric median of their layer: the others can stand in for them.

    A channel that several layers make has the sum of its scores there.
    """

    name = "my_fpgm"
    paper = "He et al., Filter Pruning via Geometric Median for Deep CNNs Acceleration, CVPR 2019"
    Config = FPGMConfig

    def scores(self, task: Task) -> Tensor:
        """Return for each unit i: Σ_j ‖w_i − w_j‖ over the filters of its layer (eq. 6 of the paper)."""
        scores = torch.zeros(task.graph.num_units, dtype=torch.float64)
        for group in task.graph.groups:
            for filters in unit_filters(task.graph, task.model, group):
                w = filters.cpu().double()  # [size, n]
                scores[group.units] += torch.cdist(w, w, p=self.config.p).sum(1)
        return scores
