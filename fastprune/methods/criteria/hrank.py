"""HRank (Lin et al., CVPR 2020): the rank of a channel's feature maps.

I_u = mean over samples of rank(X_u)            X_u: the map of one sample as a matrix, height × width  (eq. 5)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.methods.criteria.calibrated import CalibratedConfig
from fastprune.methods.criteria.features import FeatureMethod
from fastprune.options import option


@dataclass(frozen=True)
class HRankConfig(CalibratedConfig):
    """Options of HRank."""

    images: int = option(128, "calibration samples; the paper takes 500 and finds little difference", minimum=1)


class HRank(FeatureMethod):
    """Keep the channels whose feature maps have the highest rank where they are read."""

    name = "hrank"
    paper = "Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020"
    Config: ClassVar[type[Any]] = HRankConfig
    config: HRankConfig

    def measure(self, maps: Tensor) -> Tensor:
        """Return the rank of each map, summed over the samples; a map of one row has rank 1, or 0 if it is 0."""
        matrices = maps if maps.dim() == 4 else maps.reshape(*maps.shape[:2], 1, -1)
        ranks: Tensor = torch.linalg.matrix_rank(matrices.cpu()).sum(0)
        return ranks
