"""Adaptors in closed form: the 1×1 convolution that brings a sub-network's features closest to the full network's.

With Y [C', R] the features of a sub-network at the end of a stage, a column for each pixel of each image, and Ŷ [C, R]
those of the full network, eq. 7 compares A Y with Ŷ. Both sides minus their means over the columns, it is least for

    A* = Ŷ Yᵀ (Y Yᵀ + εI)⁻¹,    ε = 10⁻⁶ · the mean of the diagonal of Y Yᵀ,

and the bias A* leaves between the means. So a candidate is judged by what its features contain, not by how far one
adaptor, shared by all widths, was trained for it. Everything is float64: Y Yᵀ has the square of Y's condition number,
and losses must not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune.recovery.moments import Moments, solve, sum_rows, zero_sums

RIDGE = 1e-6  # ε, relative; dead and equal channels would make the matrix singular
ROWS = 65_536  # columns of Y at a time, about


@dataclass(frozen=True)
class FittedAdaptor:
    """The best adaptor of one candidate.

    Args:
        weight: A*, [C, C'], float64.
        bias: [C], float64.
        error: the mean of |A* Y + b − Ŷ|² over batch, channels and pixels, from the moments alone; a scalar.
    """

    weight: Tensor
    bias: Tensor
    error: Tensor

    @staticmethod
    def fit(narrow: Tensor, wide: Tensor) -> FittedAdaptor:
        """Fit the adaptor from features [N, C', ...] of a candidate to features [N, C, ...] of the full network."""
        sums = zero_sums(1, narrow.shape[1], wide.shape[1], narrow.device)
        for x, y in zip(split_rows(narrow), split_rows(wide), strict=True):
            sums += sum_rows(x[None], y[None])
        moments = Moments.of(sums, shifted=True)
        prior = torch.zeros(1, wide.shape[1], narrow.shape[1], dtype=torch.float64, device=narrow.device)
        weight = solve(moments, prior, torch.ones_like(prior[:, 0], dtype=torch.bool), RIDGE)
        bias = moments.mean_y - (weight @ moments.mean_x.unsqueeze(2)).squeeze(2)
        error = moments.errors(weight, bias).mean().clamp(min=0)
        return FittedAdaptor(weight[0], bias[0], error)

    def differences(self, narrow: Tensor, wide: Tensor) -> Iterator[Tensor]:
        """Yield A* Y + b − Ŷ of some images after the other, [N·pixels, C], float64."""
        for x, y in zip(split_rows(narrow), split_rows(wide), strict=True):
            yield torch.addmm(self.bias, x, self.weight.mT) - y


def images_at_once(features: Tensor) -> int:
    """Return the number of images whose pixels are about ``ROWS``."""
    return max(1, ROWS // max(1, features[0, 0].numel()))


def split_rows(features: Tensor) -> Iterator[Tensor]:
    """Yield the pixels of features [N, C, ...] as rows of channels, [n·pixels, C], float64, some images at a time.

    Features of other widths are split at the same images.
    """
    for some in features.split(images_at_once(features)):
        yield some.movedim(1, -1).reshape(-1, features.shape[1]).double()
