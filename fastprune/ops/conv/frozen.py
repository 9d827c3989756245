"""Convolutions whose weights stay as they are for a whole search: folded with their batch norm and packed once.

What ``masked_conv_bn_act`` does anew in every call is done here when the object is made. The price is a promise: the
weights do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprune.ops.activations import DIFFERENTIABLE_BY_VALUE, checked_activation
from fastprune.ops.conv import packed as packed_conv
from fastprune.ops.conv.arguments import (
    check_images,
    check_residual,
    count,
    frozen_affine,
    geometry_of,
    vector,
    vector_dtype,
)
from fastprune.ops.conv.deferred import Deferred
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.open_channels import Layer, fold, input_gradient_of_open, open_outputs, widened
from fastprune.ops.conv.packed import PackedWeight
from fastprune.ops.layout import layout_of
from fastprune.ops.masked_act import masked_act_backward
from fastprune.ops.masked_conv_bn_act import BatchNorm, closed_mask_gradient, forward_for_training


class FrozenConv:
    """``masked_conv_bn_act`` with the arguments that do not change in a search given in advance.

    A network of these goes over no activation between two convolutions, neither forward nor backward, if each
    result that another of them reads is a :class:`fastprune.ops.conv.deferred.Deferred`, of :meth:`defer` or
    :meth:`branch`. This holds on the CPU, in float32 and channels_last, for identity, relu and relu6, where readers
    have stride 1 and are dense, or depthwise behind a hard mask; elsewhere the results are the same, and passes
    over memory remain.

    Args:
        weight: ``[K, C / groups, R, S]``. Copied, like what follows: later changes are not seen.
        bn: ``(weight, bias, running_mean, running_var)`` or None.
        bias: ``[K]``.
        stride: One number or (vertical, horizontal), as are padding and dilation.
        padding: Zeros on each side.
        dilation: Distance of the kernel's taps.
        groups: Of the convolution.
        activation: As in :func:`fastprune.ops.masked_conv_bn_act`.
        eps: That of the batch norm.
        dtype: Of x; None: that of ``weight``. The weight is folded before it is rounded.
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
        dtype: torch.dtype | None = None,
    ) -> None:
        self.geometry = geometry_of(stride, padding, dilation, groups)
        self.activation = checked_activation(activation)
        with torch.no_grad():
            scale, shift = frozen_affine(bn, bias, eps, weight.shape[0], weight)
            self.shift = None if shift is None else shift.clone()  # it may be the bias itself
            folded = fold(weight, scale).to(weight.dtype if dtype is None else dtype)
            self.weight = folded.clone(memory_format=torch.channels_last)
        self._packed: dict[tuple[str, bool], PackedWeight] = {}  # by algorithm, and whether it is the transposed weight

    def __call__(
        self,
        x: Tensor | Deferred,
        mask: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        open_in: int | None = None,
        open_out: int | None = None,
    ) -> Tensor:
        """``mask * act(conv(x) + residual)``.

        Args:
            x: ``[N, C, H, W]``, or its first ``open_in`` channels alone.
            mask: ``[K]``.
            residual: Shaped like the result.
            open_in: How many channels of x may be open; of what is deferred itself knows.
            open_out: How many channels of the result may be open.
        """
        y: Tensor = self._apply(x, mask, residual, open_in, open_out)
        return y

    def defer(
        self,
        x: Tensor | Deferred,
        mask: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        open_in: int | None = None,
        open_out: int | None = None,
        hard: bool = False,
    ) -> Deferred:
        """The same, for another FrozenConv to read.

        Args:
            x: As in a call, like what follows.
            mask: ...
            residual: ...
            open_in: ...
            open_out: ...
            hard: Promise that the mask is 1 in the first ``open_out`` channels, and 0 behind: then the reader need not
                multiply it into its weight.

        Where nobody asks for gradients the result lacks the closed channels. Made with gradients off, it gives none to
        its mask, whoever reads it.
        """
        _check_promise(mask, open_out, hard)
        r: Tensor = self._apply(x, mask, residual, open_in, open_out, defers=True)
        return self._deferred(r, mask, open_out, hard)

    def branch(
        self,
        x: Tensor | Deferred,
        mask: Tensor | None = None,
        *,
        open_in: int | None = None,
        open_out: int | None = None,
        hard: bool = False,
    ) -> tuple[Deferred, Tensor]:
        """What ``defer`` returns, and x itself for its other readers, such as a shortcut.

        Their gradients for x come here and are added in the epilogue of the backward convolution.

        Args:
            x: As in ``defer``, like what follows; without a mask, if it is deferred.
            mask: ...
            open_in: ...
            open_out: ...
            hard: ...
        """
        if isinstance(x, Deferred) and x.mask is not None:
            raise ValueError("x: got an activation whose mask is deferred, needs one without; settle it")
        source = x._r if isinstance(x, Deferred) else x
        if not (source.requires_grad and torch.is_grad_enabled()):
            return self.defer(x, mask, open_in=open_in, open_out=open_out, hard=hard), source
        _check_promise(mask, open_out, hard)
        r, source = self._apply(x, mask, None, open_in, open_out, defers=True, branches=True)
        return self._deferred(r, mask, open_out, hard), source

    def _deferred(self, r: Tensor, mask: Tensor | None, open_out: int | None, hard: bool) -> Deferred:
        owes = self.activation if self.activation in DIFFERENTIABLE_BY_VALUE else "identity"
        mask = None if mask is None else mask.to(vector_dtype(r))
        if mask is not None and not torch.is_grad_enabled():
            mask = mask.detach()  # r lacks the channels that the gradients of closed gates are made of
        outputs = self.weight.shape[0]
        return Deferred(r, mask, owes, outputs, outputs if open_out is None else open_out, hard)

    def _apply(
        self,
        x: Tensor | Deferred,
        mask: Tensor | None,
        residual: Tensor | None,
        open_in: int | None,
        open_out: int | None,
        *,
        defers: bool = False,
        branches: bool = False,
    ) -> Any:
        outputs, inputs = self.weight.shape[0], self.weight.shape[1] * self.geometry.groups
        owed = None
        if isinstance(x, Deferred):
            if open_in is not None:
                raise ValueError(f"open_in: got {open_in} beside a deferred x, needs None: x knows how many are open")
            if x.channels != inputs:
                raise ValueError(f"x: got {x.channels} channels, needs {inputs}")
            open_in = x.open_count
            if x.mask is not None and not x.hard and self.geometry.groups > 1:
                x = x.settled()  # columns of a grouped weight are not those of x
            else:
                owed, x = x, x._r
        check_images(x, self.weight, self.geometry, open_in)
        if residual is not None:
            check_residual(residual, x, self.geometry.output_size(x.shape, self.weight.shape))
        mask = None if mask is None else vector("mask", mask, outputs, x)
        input_mask = None if owed is None or owed.mask is None else vector("x.mask", owed.mask, inputs, x)
        open_in, open_out = count("open_in", open_in, inputs), count("open_out", open_out, outputs)
        if open_out < outputs and mask is None:
            raise ValueError(f"open_out: got {open_out} without a mask, needs the mask that closes the rest")
        leaves = (x, input_mask, mask, residual)
        trains = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
        owes = None if owed is None else owed.activation
        soft = owed is not None and not owed.hard
        call = _Call(self, owes, soft, open_in, open_out, defers, branches, trains)
        # A deferred mask gets its gradient from the reader.
        return _FrozenConv.apply(x, input_mask, None if defers else mask, residual, call)

    def layer(self, x: Tensor, input_mask: Tensor | None, open_in: int) -> Layer:
        """What reads the first ``open_in`` channels of x, the mask that x owes multiplied into the weight."""
        layer = Layer(self.weight, None, self.shift, self.geometry, self.activation)
        ours = packed_conv.computes(x, self.weight, self.geometry)
        if input_mask is not None:
            layer = replace(layer, weight=(self.weight * input_mask.view(-1, 1, 1)).to(self.weight.dtype))
        if not ours:
            return layer
        algorithm = packed_conv.algorithm_for(self.weight, self.geometry, open_in)
        if input_mask is not None:
            return replace(layer, packed=packed_conv.pack(layer.weight, self.geometry, algorithm=algorithm))
        return replace(layer, packed=self.packed(self.geometry, algorithm, transposed=False))

    def packed_transposed(self, dz: Tensor) -> PackedWeight | None:
        """The weight packed for the gradient of x, if our kernel computes it."""
        transposed = self.geometry.transposed(self.weight)
        if transposed is None or not packed_conv.computes(dz, self.weight, transposed):
            return None
        algorithm = packed_conv.algorithm_for(self.weight, transposed, dz.shape[1])
        return self.packed(transposed, algorithm, transposed=True)

    def packed(self, geometry: Geometry, algorithm: str, *, transposed: bool) -> PackedWeight:
        """The weight, packed once for each algorithm."""
        key = algorithm, transposed
        if key not in self._packed:
            self._packed[key] = packed_conv.pack(self.weight, geometry, transposed=transposed, algorithm=algorithm)
        return self._packed[key]


def _check_promise(mask: Tensor | None, open_out: int | None, hard: bool) -> None:
    if hard and mask is not None and open_out is None:
        raise ValueError("open_out: got None beside hard=True, needs the number of channels whose mask is 1")


@dataclass(frozen=True)
class _Call:
    """What one call of a FrozenConv has that is no tensor."""

    conv: FrozenConv
    owed: str | None  # the activation whose derivative x owes; None: it owes nothing
    soft: bool  # whether the mask that x owes goes into the weight
    open_in: int
    open_out: int
    defers: bool
    branches: bool
    trains: bool

    @property
    def settles(self) -> str:
        """The activation whose derivative the backward pass takes itself."""
        left = self.defers and self.conv.activation in DIFFERENTIABLE_BY_VALUE
        return "identity" if left else self.conv.activation


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, input_mask: Tensor | None, mask: Tensor | None, residual: Tensor | None, call: _Call
    ) -> Tensor | tuple[Tensor, Tensor]:
        conv = call.conv
        layer = conv.layer(x, input_mask if call.soft else None, call.open_in)
        if not call.trains:
            y = open_outputs(x, layer, mask, residual, call.open_in, call.open_out)
            return y[:, : call.open_out] if call.defers else widened(y, conv.weight.shape[0])
        y, saved = forward_for_training(x, layer, mask, residual, call.open_in, call.open_out)
        ctx.call, ctx.x_size, ctx.layout = call, list(x.shape), layout_of(y)
        settles = mask is not None or call.settles != "identity"
        saved = (y if saved is None else saved) if settles else None
        ctx.save_for_backward(x if call.owed is not None else None, input_mask, mask, saved)
        return (y, x) if call.branches else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        previous, input_mask, mask, saved = ctx.saved_tensors
        call: _Call = ctx.call
        conv, open_out = call.conv, call.open_out
        for_x, for_input_mask, for_mask, for_residual = ctx.needs_input_grad[:4]
        for_images = for_x or for_input_mask
        dy = grad_outputs[0].contiguous(memory_format=ctx.layout)
        dz: Tensor | None = dy[:, :open_out]
        dmask = dx = dinput_mask = None
        if saved is not None:
            dz, dmask, _, _ = masked_act_backward(
                dy[:, :open_out],
                saved[:, :open_out],
                mask=None if mask is None else mask[:open_out],
                activation=call.settles,
                want_dx=for_images or for_residual,
                want_dmask=for_mask,
            )
            if dmask is not None:
                dmask = torch.cat([dmask, closed_mask_gradient(dy, saved, call.settles, open_out)])
        if for_images and dz is not None:
            others = grad_outputs[1] if call.branches else None
            dx, dinput_mask = _gradients_before(dz, ctx.x_size, call, previous, input_mask, others, for_input_mask)
        residual = widened(dz, conv.weight.shape[0]) if for_residual and dz is not None else None
        return dx, dinput_mask, dmask, residual, None


def _gradients_before(
    dz: Tensor,
    x_size: list[int],
    call: _Call,
    previous: Tensor | None,
    mask: Tensor | None,
    others: Tensor | None,
    want_dmask: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, or of what x owes through, and of its mask."""
    conv, activation = call.conv, call.owed or "identity"
    inputs = conv.weight.shape[1] * conv.geometry.groups
    packed = conv.packed_transposed(dz) if dz.shape[1] > 0 else None
    if packed is not None and x_size[1] == inputs:
        rest: dict[str, Any] = {"residual": others, "mask": mask, "activation": activation, "want_dmask": want_dmask}
        return packed_conv.convolve_back(dz, packed, previous=previous, **rest)
    size = [x_size[0], inputs, *x_size[2:]]  # of x with the channels that it may lack
    dx = input_gradient_of_open(dz, size, conv.weight, conv.geometry, packed)[:, : x_size[1]]
    dx = dx if others is None else dx + others
    if previous is None or (mask is None and activation == "identity"):
        return dx, None
    into, dmask, _, _ = masked_act_backward(dx, previous, mask, activation=activation, want_dmask=want_dmask)
    assert into is not None
    return into, dmask
