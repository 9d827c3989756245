"""Convolutions whose weights stay as they are for a whole search: folded with their batch norm and packed once.

What ``masked_conv_bn_act`` does anew in every call is done here when the object is made. The price is a promise: the
weights do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprune.ops import packed_conv
from fastprune.ops.activations import checked_activation
from fastprune.ops.conv_arguments import (
    check_images,
    check_residual,
    count,
    frozen_affine,
    geometry_of,
    vector,
)
from fastprune.ops.layout import layout_of
from fastprune.ops.masked_act import masked_act_backward
from fastprune.ops.masked_conv_bn_act import (
    BatchNorm,
    closed_mask_gradient,
    forward_for_training,
)
from fastprune.ops.open_channels import Layer, fold, input_gradient_of_open, open_outputs, widened
from fastprune.ops.packed_conv import PackedWeight


class FrozenConv:
    """``masked_conv_bn_act`` with the arguments that do not change in a search given in advance.

    Args:
        weight: ``[K, C / groups, R, S]``. Copied: later changes of it are not seen.
        bn: ``(weight, bias, running_mean, running_var)`` or None.
        bias: ``[K]``.
        stride: One number or (vertical, horizontal), as are padding and dilation.
        padding: Zeros on each side.
        dilation: Distance of the kernel's taps.
        groups: Of the convolution.
        activation: As in :func:`fastprune.ops.masked_conv_bn_act`.
        eps: That of the batch norm.
    """

    def __init__(
        self,
        weight: Tensor,
        bn: BatchNorm | None = None,
        *,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        activation: str | None = "relu",
        eps: float = 1e-5,
    ) -> None:
        self.geometry = geometry_of(stride, padding, dilation, groups)
        self.activation = checked_activation(activation)
        with torch.no_grad():
            scale, self.shift = frozen_affine(bn, bias, eps, weight.shape[0], weight)
            self.weight = fold(weight, scale).clone(memory_format=torch.channels_last)
        self._packed: PackedWeight | None = None
        self._packed_transposed: PackedWeight | None = None

    def __call__(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        input_mask: Tensor | None = None,
        residual: Tensor | None = None,
        open_in: int | None = None,
        open_out: int | None = None,
        deferred: bool = False,
    ) -> Tensor:
        """``mask * act(conv(x) + residual)``.

        A gate between two convolutions needs no pass over the activation. With ``deferred`` the result is what comes
        *before* the mask, though its gradient is that of the masked one; who reads it has to pass the same mask as
        ``input_mask`` (multiplied into the weight's columns, and without a gradient, which the first convolution's
        mask receives) or, if the mask is 1 in a prefix and 0 behind, the length of the prefix as ``open_in``. Where
        nobody asks for gradients such a result lacks the closed channels: ``[N, open_out, P, Q]``.

        Args:
            x: ``[N, C, H, W]``, or its first ``open_in`` channels alone.
            mask: ``[K]``.
            input_mask: ``[C]``, the mask that x owes.
            residual: Shaped like the result.
            open_in: How many channels of x may be open.
            open_out: How many channels of the result may be open.
            deferred: Leave the mask to the reader.
        """
        outputs, inputs = self.weight.shape[0], self.weight.shape[1] * self.geometry.groups
        check_images(x, self.weight, self.geometry, open_in)
        if residual is not None:
            check_residual(residual, x, self.geometry.output_size(x, self.weight))
        mask = None if mask is None else vector("mask", mask, outputs, x)
        open_in, open_out = count("open_in", open_in, inputs), count("open_out", open_out, outputs)
        if open_out < outputs and mask is None:
            raise ValueError(f"open_out: got {open_out} without a mask, needs the mask that closes the rest")
        if input_mask is not None:
            if self.geometry.groups > 1:
                raise ValueError("input_mask: got one for a grouped convolution, needs groups = 1; pass a masked x")
            input_mask = vector("input_mask", input_mask, inputs, x).detach()
        y: Tensor = _FrozenConv.apply(x, mask, residual, input_mask, self, open_in, open_out, deferred)
        return y

    def layer(self, x: Tensor, input_mask: Tensor | None) -> Layer:
        """What computes x, the mask that x owes multiplied into the weight."""
        layer = Layer(self.weight, None, self.shift, self.geometry, self.activation)
        ours = packed_conv.computes(x, self.weight, self.geometry)
        if input_mask is not None:
            weight = (self.weight * input_mask.view(-1, 1, 1)).to(self.weight.dtype)
            return replace(layer, weight=weight, packed=packed_conv.pack(weight, self.geometry) if ours else None)
        if ours and self._packed is None:
            self._packed = packed_conv.pack(self.weight, self.geometry)
        return replace(layer, packed=self._packed if ours else None)

    def packed_transposed(self, dz: Tensor) -> PackedWeight | None:
        """The weight packed for the gradient of x, if our kernel computes it."""
        transposed = self.geometry.transposed(self.weight)
        if transposed is None or not packed_conv.computes(dz, self.weight, transposed):
            return None
        if self._packed_transposed is None:
            self._packed_transposed = packed_conv.pack(self.weight, transposed, transposed=True)
        return self._packed_transposed


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
        input_mask: Tensor | None,
        conv: FrozenConv,
        open_in: int,
        open_out: int,
        deferred: bool,
    ) -> Tensor:
        trains = any(ctx.needs_input_grad)
        layer = conv.layer(x, input_mask)
        if trains:
            y, saved = forward_for_training(x, layer, None if deferred else mask, residual, open_in, open_out)
            ctx.save_for_backward(mask, y if saved is None else saved)
            ctx.conv, ctx.x_size, ctx.open_out = conv, list(x.shape), open_out
            return y
        y = open_outputs(x, layer, None if deferred else mask, residual, open_in, open_out)
        return y[:, :open_out] if deferred else widened(y, conv.weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        mask, saved = ctx.saved_tensors
        dy = grad_outputs[0].contiguous(memory_format=layout_of(saved))
        conv: FrozenConv = ctx.conv
        open_out, outputs = ctx.open_out, conv.weight.shape[0]
        for_x, for_mask, for_residual = ctx.needs_input_grad[:3]
        dz, dmask, _, _ = masked_act_backward(
            dy[:, :open_out],
            saved[:, :open_out],
            mask=None if mask is None else mask[:open_out],
            activation=conv.activation,
            want_dx=for_x or for_residual,
            want_dmask=for_mask,
        )
        if dmask is not None:
            dmask = torch.cat([dmask, closed_mask_gradient(dy, saved, conv.activation, open_out)])
        dx = residual = None
        if for_x and dz is not None:
            inputs = conv.weight.shape[1] * conv.geometry.groups
            size = [ctx.x_size[0], inputs, *ctx.x_size[2:]]  # of x with the channels that it may lack
            dx = input_gradient_of_open(dz, size, conv.weight, conv.geometry, conv.packed_transposed(dz))
            dx = dx[:, : ctx.x_size[1]]
        if for_residual and dz is not None:
            residual = widened(dz, outputs)
        return dx, dmask, residual, None, None, None, None, None
