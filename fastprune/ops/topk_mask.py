"""Soft top-k masks of all channel groups in one call."""

from typing import Any

import torch
from torch import Tensor

from fastprune.ops.arguments import HALVES
from fastprune.ops.library import _C, refuse_transforms, register


def _kernel(scores: Tensor, keep: Tensor, offsets: Tensor, window: Tensor | None) -> Tensor:
    scores, keep, offsets = scores.contiguous(), keep.contiguous(), offsets.contiguous()
    window = None if window is None else window.contiguous()
    if offsets.device != scores.device and offsets.device.type == "cpu":
        offsets = offsets.to(scores.device)
    mask = torch.empty_like(scores)
    # The number of threads is torch's, which users know, and which is 1 in the workers of a DataLoader.
    _C.topk_mask(scores, keep, offsets, window, mask, torch.get_num_threads())
    return mask


def _fake(scores: Tensor, keep: Tensor, offsets: Tensor, window: Tensor | None) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


register("_topk_mask(Tensor scores, Tensor keep, Tensor offsets, Tensor? window) -> Tensor", _kernel, _fake)


class _TopkMask(torch.autograd.Function):
    """Straight-through: the gradient of the mask is the gradient of the scores (DDNP, section 3.4)."""

    # With ``ctx`` in forward: the form with setup_context, made for functorch, costs 12 us more a call.
    @staticmethod
    def forward(ctx: Any, scores: Tensor, keep: Tensor, offsets: Tensor, window: Tensor | None) -> Tensor:
        mask: Tensor = torch.ops.fastprune._topk_mask(scores, keep, offsets, window)
        return mask

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_outputs[0], None, None, None


def topk_mask(scores: Tensor, keep: Tensor, offsets: Tensor, window: Tensor | None = None) -> Tensor:
    r"""Compute the soft (or hard) top-k mask of every channel group, in one kernel.

    In a group of :math:`C` channels with keep fraction :math:`k`, the channel whose score has rank :math:`i`
    (:math:`i = 1 \dots C`, ties to the lowest index) gets

    .. math:: S\left(\frac{Ck - (i - 1/2)}{\gamma}\right), \quad S(t) = -2t^3 + \tfrac{3}{2}t + \tfrac{1}{2}
        \text{ on } [-\tfrac{1}{2}, \tfrac{1}{2}], \text{ 0 below, 1 above,}

    with :math:`\gamma = \min(\text{window}, 2(C - Ck), 2Ck)`, the largest window inside the group. At
    :math:`\gamma = 0` the mask is hard: 1 where :math:`i - 1/2 < Ck`. The result is deterministic, with the same bits
    on the CPU and on CUDA.

    The gradient is straight-through: ``scores`` receives the gradient of the mask unchanged; ``keep``, ``offsets`` and
    ``window`` receive none. The gradient can be differentiated again.

    Args:
        scores: Importance of every unit, ``[U]``, float32 or float64 (float16 and bfloat16 are computed in float32).
            ``inf`` is allowed, and ``-0.0`` ties with ``0.0``.
        keep: Fraction of each group to keep, ``[G]`` in [0, 1], dtype and device of ``scores``.
        offsets: Start of each group, ``[G + 1]`` int64, ascending from 0 to ``U``, on the device of ``scores``. From
            the CPU it is copied there, which a CUDA graph cannot capture.
        window: Width of the soft transition in channels, ``[G]`` and at least 0, dtype and device of ``scores``.
            ``None``: hard masks.

    Returns:
        The mask, ``[U]``, in [0, 1], dtype and device of ``scores``.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: Shapes or devices do not fit; on the CPU also if a score is NaN, ``keep`` is outside of [0, 1],
            ``window`` is negative or ``offsets`` do not ascend. On CUDA values cannot be refused without waiting for
            the device: there a group with such a value gets a mask of NaN, and bad ``offsets`` give NaN everywhere.
        RuntimeError: The call is under ``torch.func`` (``vmap``, ``grad`` and their like).

    Source: DDNP (Gao et al., ECCV 2022), eq. 7, mirrored as in its Fig. 2, with half-integer ranks so that the mask
    sums to :math:`Ck`.

    Example:
        >>> import torch
        >>> from fastprune import ops
        >>> scores = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.3, 0.2])
        >>> offsets = torch.tensor([0, 4, 6])  # two groups: four channels and two
        >>> ops.topk_mask(scores, torch.tensor([0.5, 0.5]), offsets)
        tensor([1., 0., 0., 1., 1., 0.])
        >>> ops.topk_mask(scores, torch.tensor([0.5, 1.0]), offsets, window=torch.tensor([2.0, 2.0]))
        tensor([1.0000, 0.0000, 0.1562, 0.8438, 1.0000, 1.0000])
    """
    refuse_transforms("topk_mask")
    if scores.dtype in HALVES:  # widening is exact and keeps the order; the result is rounded once
        wide_window = None if window is None else window.float()
        return topk_mask(scores.float(), keep.float(), offsets, wide_window).to(scores.dtype)
    # Without a gradient for them, the mask must not require one: backward() would run and do nothing.
    keep = keep.detach() if keep.requires_grad else keep
    window = window.detach() if window is not None and window.requires_grad else window
    mask: Tensor = _TopkMask.apply(scores, keep, offsets, window)
    return mask
