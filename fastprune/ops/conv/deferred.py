"""Activations whose mask, and the gradient through mask and activation, are left to the convolution that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastprune.ops.conv.open_channels import widened
from fastprune.ops.masked_act import masked_act, masked_act_backward


@dataclass(frozen=True, eq=False)
class Deferred:
    """``mask * r``, not yet multiplied, where the mask of closed channels counts as zero.

    Its reader multiplies the mask into its weight's columns, or reads open channels alone. The gradient that it hands
    back for ``r`` is the one from before the activation, to which it comes in the epilogue of its own backward
    convolution, together with the mask's: neither direction has a pass over memory between two convolutions.

    Args:
        _r: ``act(…)``, ``[N, K, P, Q]``; without gradients ``[N, open_count, P, Q]``. Private: the gradient that it
            wants is that of what the activation read.
        mask: ``[K]``, or None for all ones.
        activation: Whose derivative the reader still owes: one that is a function of ``r``.
        channels: K.
        open_count: All channels behind so many are closed.
        hard: Whether the mask is 1 in all channels before.
    """

    _r: Tensor
    mask: Tensor | None
    activation: str
    channels: int
    open_count: int
    hard: bool

    def settled(self) -> Tensor:
        """``mask * r`` ``[N, K, P, Q]``, for readers that know nothing of this class.

        Without a mask it is the memory that other readers of this read: not to be written into.
        """
        y: Tensor = _Settled.apply(self._r, self.mask, self)
        return y


class _Settled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, mask: Tensor | None, deferred: Deferred) -> Tensor:
        channels, open_count = deferred.channels, deferred.open_count
        if mask is not None and open_count < channels:
            mask = F.pad(mask[:open_count], (0, channels - open_count))
        ctx.activation = deferred.activation
        ctx.save_for_backward(r, mask)
        if mask is None:
            return r.view_as(r)
        y, _ = masked_act(r, mask=mask[: r.shape[1]], activation="identity")
        return widened(y, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        r, mask = ctx.saved_tensors
        for_r, for_mask = ctx.needs_input_grad[:2]
        dz, dmask, _, _ = masked_act_backward(
            grad_outputs[0], r, mask, activation=ctx.activation, want_dx=for_r, want_dmask=for_mask
        )
        return dz, dmask, None
