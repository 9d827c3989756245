"""CHIP (Sui et al., NeurIPS 2021): the independence of a channel from the others of its layer.

    I_u = mean over samples of ‖A‖_* − ‖A without row u‖_*          A: the maps of a sample as rows [C, P]  (eq. 3)

The nuclear norm ‖·‖_* comes from the eigenvalues of A Aᵀ, or of Aᵀ A where there are fewer positions than channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.methods.criteria.calibrated import CalibratedConfig
from fastprune.methods.criteria.features import FeatureMethod
from fastprune.options import option

AT_A_TIME = 1 << 24  # numbers in the matrices whose eigenvalues are computed at a time


@dataclass(frozen=True)
class CHIPConfig(CalibratedConfig):
    """Options of CHIP."""

    images: int = option(32, "calibration samples; each costs one eigenvalue problem per channel", minimum=1)


class CHIP(FeatureMethod):
    """Keep the channels whose feature maps are least a combination of those of others."""

    name = "chip"
    paper = "Sui et al., CHIP: CHannel Independence-based Pruning for Compact Neural Networks, NeurIPS 2021"
    Config: ClassVar[type[Any]] = CHIPConfig
    config: CHIPConfig

    def measure(self, maps: Tensor) -> Tensor:
        """Return the independence of each channel, summed over the samples."""
        rows = maps.reshape(*maps.shape[:2], -1).double()
        return torch.stack([independence(a) for a in rows]).sum(0)


def independence(a: Tensor) -> Tensor:
    """Return by how much the nuclear norm of a matrix [C, P] falls without each of its rows, [C]."""
    channels, positions = a.shape
    gram = a @ a.mT if channels <= positions else a.mT @ a
    whole, parts = nuclear_norm(gram), []
    for some in torch.arange(channels, device=a.device).split(max(1, AT_A_TIME // gram.numel())):
        if channels <= positions:  # row and column of the channel to 0: the other eigenvalues stay what they are
            stays = (torch.arange(channels, device=a.device) != some.unsqueeze(1)).to(a.dtype)
            without = gram * stays.unsqueeze(1) * stays.unsqueeze(2)
        else:
            without = gram - a[some].unsqueeze(2) * a[some].unsqueeze(1)
        parts.append(whole - nuclear_norm(without))
    return torch.cat(parts)


def nuclear_norm(gram: Tensor) -> Tensor:
    """Return the sum of the singular values of matrices with these products with themselves, [..., n, n] -> [...]."""
    total: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)
    return total
