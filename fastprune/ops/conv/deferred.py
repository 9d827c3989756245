"""Activations that leave their mask, and the gradient through mask and activation, to the convolution behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastprune.ops.conv.open_channels import widen
from fastprune.ops.masked_act import masked_act, masked_act_backward


@dataclass(frozen=True, eq=False)
class Deferred:
    """``mask * r`` before the product is computed; the mask of closed channels counts as zero.

    Its reader multiplies the mask into the columns of its own weight, or reads open channels only. The gradient that it
    returns for ``r`` is the one before the activation: the epilogue of its backward convolution computes that and the
    gradient of the mask. Neither direction has a pass over memory between two convolutions.

    Args:
        _r: ``act(…)``, ``[N, K, P, Q]``; without gradients ``[N, open_count, P, Q]``. Private: the gradient that it
            expects is that of the activation's argument.
        mask: ``[K]``, or None for all ones.
        activation: Name of the activation whose derivative the reader has to apply, a function of ``r``.
        channels: K.
        open_count: Number of channels, counted from the first, that may be open.
        hard: Whether the mask is 1 in all of these.
    """

    _r: Tensor
    mask: Tensor | None
    activation: str
    channels: int
    open_count: int
    hard: bool

    def settled(self) -> Tensor:
        """Return ``mask * r`` ``[N, K, P, Q]``, for readers that do not know this class.

        Without a mask it is memory that other readers of this object read: do not write into it.
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
        return widen(y, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        r, mask = ctx.saved_tensors
        for_r, for_mask = ctx.needs_input_grad[:2]
        dz, dmask, _, _ = masked_act_backward(
            grad_outputs[0], r, mask, activation=ctx.activation, want_dx=for_r, want_dmask=for_mask
        )
        return dz, dmask, None
