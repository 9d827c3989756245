"""Soft top-k masks of channel groups."""

from itertools import pairwise

import torch
from torch import Tensor


def topk_mask(scores: Tensor, keep: Tensor, offsets: Tensor, window: Tensor | None = None) -> Tensor:
    """``mask_i = S((C k - (i - 1/2)) / g)`` for the channel of rank i in a group of C channels.

    S(t) = -2 t^3 + 3/2 t + 1/2 on [-1/2, 1/2], 0 below and 1 above; g = min(window, 2 (C - C k), 2 C k), and k is the
    fraction in ``keep``. At g = 0 the mask is 1 where i - 1/2 < C k, else 0. The same arguments and straight-through
    gradient as :func:`fastprune.ops.topk_mask`.

    Source: DDNP (Gao et al., ECCV 2022), eq. 7.
    """
    mask = torch.empty_like(scores)
    bounds = offsets.tolist()
    for group, (begin, end) in enumerate(pairwise(bounds)):
        with torch.no_grad():
            asked = scores.new_zeros(()) if window is None else window[group]
            values = values_by_rank(end - begin, keep[group], asked)
            order = torch.argsort(scores[begin:end], descending=True, stable=True)
            mask[begin:end][order] = values
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


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """Return the values of ``mask``; its gradient goes to ``scores``."""
    result: Tensor = _StraightThrough.apply(mask, scores)
    return result


class _StraightThrough(torch.autograd.Function):
    # The usual mask + scores - scores.detach() would be NaN for infinite scores and round away bits of the mask.
    @staticmethod
    def forward(ctx: object, mask: Tensor, scores: Tensor) -> Tensor:
        return mask

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        return None, grad_outputs[0]
