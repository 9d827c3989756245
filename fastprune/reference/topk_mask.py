"""Soft top-k masks of channel groups."""

from itertools import pairwise

import torch
from torch import Tensor

from fastprune.reference.straight_through import straight_through


def topk_mask(scores: Tensor, keep: Tensor, offsets: Tensor, window: Tensor | None = None) -> Tensor:
    """``mask_i = S((C k - (i - 1/2)) / g)`` for the channel of rank i in a group of C channels.

    S(t) = -2 t^3 + 3/2 t + 1/2 on [-1/2, 1/2], 0 below and 1 above; g = min(window, 2 (C - C k), 2 C k), and k is the
    fraction in ``keep``. At g = 0 the mask is 1 where i - 1/2 < C k, else 0. The same arguments and straight-through
    gradient as :func:`fastprune.ops.topk_mask`.

    Source: DDNP (Gao et al., ECCV 2022), eq. 7.
    """
    mask = torch.empty_like(scores)
    with torch.no_grad():
        for group, (begin, end) in enumerate(pairwise(offsets.tolist())):
            asked = scores.new_zeros(()) if window is None else window[group]
            order = scores[begin:end].argsort(descending=True, stable=True)
            mask[begin:end][order] = values_by_rank(end - begin, keep[group], asked)
    return straight_through(mask, scores)


def values_by_rank(size: int, keep: Tensor, window: Tensor) -> Tensor:
    """Return the masks of ``size`` channels in the order of their ranks."""
    centre = size * keep  # u
    width = torch.minimum(window, torch.minimum(2 * (size - centre), 2 * centre))  # gamma_eff
    distance = centre - (torch.arange(size, dtype=keep.dtype, device=keep.device) + 0.5)  # u - (i - 1/2)
    if width == 0:
        return (distance > 0).to(keep.dtype)
    t = (distance / width).clamp(-0.5, 0.5)  # before the cubic, which turns back outside
    return -2 * t**3 + 1.5 * t + 0.5
