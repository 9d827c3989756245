"""Convolutions whose weights do not change during a search: folded with their batch norm and packed once.

``masked_conv_bn_act`` folds and packs in every call; here it is done when the object is made. The price is a promise:
the weights do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprune.ops.activations import DIFFERENTIABLE_BY_VALUE, check_activation
from fastprune.ops.arguments import check_vector, vector_dtype
from fastprune.ops.conv import packed
from fastprune.ops.conv.arguments import (
    FrozenBatchNorm,
    check_count,
    check_images,
    check_residual,
    fold_batch_norm,
    make_geometry,
)
from fastprune.ops.conv.deferred import Deferred
from fastprune.ops.conv.fused_back import BackwardInputs, input_gradients
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.open_channels import ConvLayer, activation_gradients, fold, widen
from fastprune.ops.conv.packed import PackedWeight
from fastprune.ops.conv.route import convolve_for_inference, convolve_for_training, input_gradient
from fastprune.ops.conv.triton_conv import BackwardEpilogue
from fastprune.ops.layout import layout_of
from fastprune.ops.masked_act import masked_act_backward


class FrozenConv:
    """``masked_conv_bn_act`` whose arguments that do not change in a search are given in advance.

    A network of these passes over no activation between two convolutions, neither forward nor backward, if each
    result that another of them reads is a :class:`fastprune.ops.conv.deferred.Deferred`, of :meth:`defer` or
    :meth:`branch`. This holds on the CPU, in float32 and channels_last, for identity, relu and relu6, where readers
    have stride 1 and are dense or depthwise; elsewhere the results are the same, and passes
    over memory remain.

    Args:
        weight: ``[K, C / groups, R, S]``. This and the next two are copied: later changes are not seen.
        bn: ``(weight, bias, running_mean, running_var)``, ``[K]`` each, or None.
        bias: Bias of the convolution, ``[K]``.
        stride: One number or (vertical, horizontal), as are padding and dilation.
        padding: Zeros on each side.
        dilation: Distance of the kernel's taps.
        groups: Number of groups of channels.
        activation: As in :func:`fastprune.ops.masked_conv_bn_act`.
        eps: Number added to the variance of the batch norm.
        dtype: Dtype of x; None: that of ``weight``. The weight is folded before it is rounded.
    """

    def __init__(
        self,
        weight: Tensor,
        bn: FrozenBatchNorm | None = None,
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
        self.geometry = make_geometry(stride, padding, dilation, groups)
        self.activation = check_activation(activation)
        with torch.no_grad():
            scale, shift = fold_batch_norm(bn, bias, eps, weight.shape[0], weight)
            self.shift = None if shift is None else shift.clone()  # it may be the bias itself
            folded = fold(weight, scale).to(weight.dtype if dtype is None else dtype)
            self.weight = folded.clone(memory_format=torch.channels_last)
        self._packed: dict[tuple[str, bool], PackedWeight] = {}  # by algorithm, and whether the weight is transposed

    def __call__(
        self,
        x: Tensor | Deferred,
        mask: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        open_in: int | None = None,
        open_out: int | None = None,
    ) -> Tensor:
        """Compute ``mask * act(conv(x) + residual)``.

        Args:
            x: ``[N, C, H, W]``, or its first ``open_in`` channels.
            mask: ``[K]``.
            residual: A tensor of the result's shape.
            open_in: How many channels of x may be open; None for a deferred x, which knows it.
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
        """Compute the same, for another FrozenConv to read.

        If nothing requires a gradient, the closed channels are left out of the result. A result computed with gradients
        off gives its mask no gradient, also in a later reader.

        Args:
            x: As in a call.
            mask: As in a call.
            residual: As in a call.
            open_in: As in a call.
            open_out: As in a call.
            hard: Promise that the mask is 1 in the first ``open_out`` channels and 0 behind: then the reader need not
                multiply it into its weight.
        """
        _check_promise(mask, open_out, hard)
        r: Tensor = self._apply(x, mask, residual, open_in, open_out, defers=True)
        return self._defer(r, mask, open_out, hard)

    def branch(
        self,
        x: Tensor | Deferred,
        mask: Tensor | None = None,
        *,
        open_in: int | None = None,
        open_out: int | None = None,
        hard: bool = False,
    ) -> tuple[Deferred, Tensor]:
        """Return the result of :meth:`defer`, and x itself for its other readers, such as a shortcut.

        The gradients of these readers are added in the epilogue of this convolution's backward pass.

        Args:
            x: As in a call; if it is deferred, then without a mask.
            mask: As in a call.
            open_in: As in a call.
            open_out: As in a call.
            hard: As in :meth:`defer`.
        """
        if isinstance(x, Deferred) and x.mask is not None:
            raise ValueError("x: got an activation whose mask is deferred, needs one without; call its settled()")
        source = x._r if isinstance(x, Deferred) else x
        if not (source.requires_grad and torch.is_grad_enabled()):
            return self.defer(x, mask, open_in=open_in, open_out=open_out, hard=hard), source
        _check_promise(mask, open_out, hard)
        r, source = self._apply(x, mask, None, open_in, open_out, defers=True, branches=True)
        return self._defer(r, mask, open_out, hard), source

    def _defer(self, r: Tensor, mask: Tensor | None, open_out: int | None, hard: bool) -> Deferred:
        owed = self.activation if self.activation in DIFFERENTIABLE_BY_VALUE else "identity"
        mask = None if mask is None else mask.to(vector_dtype(r))
        if mask is not None and not torch.is_grad_enabled():
            mask = mask.detach()  # r lacks the channels that the gradients of closed gates are computed from
        outputs = self.weight.shape[0]
        return Deferred(r, mask, owed, outputs, outputs if open_out is None else open_out, hard)

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
        x, deferred, open_in = self._take_apart(x, open_in)
        check_images(x, self.weight, self.geometry, open_in)
        if residual is not None:
            check_residual(residual, x, self.geometry.output_size(x.shape, self.weight.shape))
        mask = None if mask is None else check_vector("mask", mask, x, outputs)
        input_mask = None if deferred is None else deferred.mask
        input_mask = None if input_mask is None else check_vector("x.mask", input_mask, x, inputs)
        open_in, open_out = check_count("open_in", open_in, inputs), check_count("open_out", open_out, outputs)
        if open_out < outputs and mask is None:
            raise ValueError(f"open_out: got {open_out} without a mask, needs the mask that closes the rest")
        leaves = (x, input_mask, mask, residual)
        trains = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
        owed = None if deferred is None else deferred.activation
        soft = deferred is not None and not deferred.hard
        call = _Call(self, owed, soft, open_in, open_out, defers, branches, trains)
        # A deferred mask gets its gradient from the reader.
        return _FrozenConv.apply(x, input_mask, None if defers else mask, residual, call)

    def _take_apart(self, x: Tensor | Deferred, open_in: int | None) -> tuple[Tensor, Deferred | None, int | None]:
        """Return the tensor to read, the deferred activation that it is part of, and the count of open inputs."""
        if isinstance(x, Tensor):
            return x, None, open_in
        inputs = self.weight.shape[1] * self.geometry.groups
        if open_in is not None:
            raise ValueError(f"open_in: got {open_in} beside a deferred x, needs None: x knows how many are open")
        if x.channels != inputs:
            raise ValueError(f"x: got {x.channels} channels, needs {inputs}")
        return x._r, x, x.open_count

    def make_layer(self, x: Tensor, input_mask: Tensor | None, open_in: int) -> ConvLayer:
        """Make the layer that reads the first ``open_in`` channels of x; ``input_mask`` goes into its weight."""
        layer = ConvLayer(self.weight, None, self.shift, self.geometry, self.activation)
        ours = packed.computes(x, self.weight, self.geometry)
        if input_mask is not None:
            columns = columns_of(input_mask, self.weight, self.geometry.groups)
            layer = replace(layer, weight=(self.weight * columns).to(self.weight.dtype))
        if not ours:
            return layer
        algorithm = packed.algorithm_for(self.weight, self.geometry, open_in)
        if input_mask is not None:
            return replace(layer, packed=packed.pack(layer.weight, self.geometry, algorithm=algorithm))
        return replace(layer, packed=self._pack(self.geometry, algorithm, transposed=False))

    def pack_transposed(self, dz: Tensor) -> PackedWeight | None:
        """Pack the weight for the gradient of x, if our kernel computes it."""
        transposed = self.geometry.transposed(self.weight)
        if transposed is None or not packed.computes(dz, self.weight, transposed):
            return None
        algorithm = packed.algorithm_for(self.weight, transposed, dz.shape[1])
        return self._pack(transposed, algorithm, transposed=True)

    def _pack(self, geometry: Geometry, algorithm: str, *, transposed: bool) -> PackedWeight:
        """Pack the weight, once for each algorithm."""
        key = algorithm, transposed
        if key not in self._packed:
            self._packed[key] = packed.pack(self.weight, geometry, transposed=transposed, algorithm=algorithm)
        return self._packed[key]


def columns_of(mask: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return the mask ``[C]`` as a factor of the columns of a weight ``[K, C / groups, R, S]``."""
    if groups == 1:
        return mask.view(-1, 1, 1)
    outputs, inputs = weight.shape[0], weight.shape[1]
    return mask.view(groups, 1, inputs).expand(-1, outputs // groups, -1).reshape(outputs, inputs, 1, 1)


def _check_promise(mask: Tensor | None, open_out: int | None, hard: bool) -> None:
    if hard and mask is not None and open_out is None:
        raise ValueError("open_out: got None beside hard=True, needs the number of channels whose mask is 1")


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of a FrozenConv that are not tensors.

    Args:
        conv: The convolution.
        owed: Name of the activation whose derivative the backward pass has to apply for x; None: there is none.
        soft: Whether the deferred mask of x goes into the weight.
        open_in: Number of open inputs.
        open_out: Number of open outputs.
        defers: Whether the reader of the result applies its mask, and the derivative of its activation.
        branches: Whether x is a result, too.
        trains: Whether there will be a backward pass.
    """

    conv: FrozenConv
    owed: str | None
    soft: bool
    open_in: int
    open_out: int
    defers: bool
    branches: bool
    trains: bool

    @property
    def own_activation(self) -> str:
        """The activation whose derivative the backward pass applies itself."""
        left = self.defers and self.conv.activation in DIFFERENTIABLE_BY_VALUE
        return "identity" if left else self.conv.activation


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, input_mask: Tensor | None, mask: Tensor | None, residual: Tensor | None, call: _Call
    ) -> Tensor | tuple[Tensor, Tensor]:
        conv = call.conv
        layer = conv.make_layer(x, input_mask if call.soft else None, call.open_in)
        if not call.trains:
            y = convolve_for_inference(x, layer, mask, residual, call.open_in, call.open_out)
            return y[:, : call.open_out] if call.defers else widen(y, conv.weight.shape[0])
        y, saved = convolve_for_training(x, layer, mask, residual, call.open_in, call.open_out)
        ctx.call, ctx.x_size, ctx.layout = call, list(x.shape), layout_of(y)
        acts = mask is not None or call.own_activation != "identity"
        saved = (y if saved is None else saved) if acts else None
        ctx.save_for_backward(x if call.owed is not None else None, input_mask, mask, saved)
        return (y, x) if call.branches else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        previous, input_mask, mask, saved = ctx.saved_tensors
        call: _Call = ctx.call
        for_x, for_input_mask, for_mask, for_residual = ctx.needs_input_grad[:4]
        for_images = for_x or for_input_mask
        dy = grad_outputs[0].contiguous(memory_format=ctx.layout)
        dz: Tensor | None = dy[:, : call.open_out]
        dmask = dx = dinput_mask = None
        if saved is not None:
            dz, dmask, _ = activation_gradients(
                dy, saved, mask, None, call.own_activation, call.open_out,
                want_dz=for_images or for_residual, want_dmask=for_mask,
            )  # fmt: skip
        if for_images and dz is not None:
            others = grad_outputs[1] if call.branches else None
            dx, dinput_mask = _input_gradients(
                dz, ctx.x_size, call, previous, input_mask, others, want_dx=for_x, want_dmask=for_input_mask
            )
        residual = widen(dz, call.conv.weight.shape[0]) if for_residual and dz is not None else None
        return dx, dinput_mask, dmask, residual, None


def _input_gradients(
    dz: Tensor,
    x_size: list[int],
    call: _Call,
    previous: Tensor | None,
    mask: Tensor | None,
    others: Tensor | None,
    *,
    want_dx: bool,
    want_dmask: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of x (for a deferred x, of its activation's argument) and of its mask.

    Args:
        dz: ``[N, open_out, P, Q]``.
        x_size: Shape of x.
        call: The call.
        previous: x, if it is deferred.
        mask: Its mask.
        others: The gradient of other readers of x.
        want_dx: Whether the gradient of x is needed; otherwise it may be missing.
        want_dmask: Whether to compute the gradient of the mask.
    """
    conv, activation = call.conv, call.owed or "identity"
    inputs = conv.weight.shape[1] * conv.geometry.groups
    weight = conv.pack_transposed(dz) if dz.shape[1] > 0 else None
    if weight is not None and x_size[1] == inputs:
        return packed.convolve_back(
            dz, weight, residual=others, previous=previous, mask=mask, activation=activation, want_dmask=want_dmask
        )
    if previous is not None and mask is None and activation == "identity":
        previous = None  # nothing is multiplied
    follows = previous is not None or others is not None
    if dz.is_cuda and want_dx and x_size[1] == inputs and dz.shape[1] > 0 and follows:
        epilogue = BackwardEpilogue(previous, mask, others, activation)
        return input_gradients(BackwardInputs(dz, conv.weight, x_size, conv.geometry, epilogue, want_dmask))
    size = [x_size[0], inputs, *x_size[2:]]  # of x with the channels that it may lack
    dx = input_gradient(dz, size, conv.weight, conv.geometry, weight)[:, : x_size[1]]
    if previous is None:
        return dx if others is None else dx + others, None
    into, dmask, _, _ = masked_act_backward(
        dx, previous, mask, others=others, activation=activation, want_dx=want_dx, want_dmask=want_dmask
    )
    return into, dmask
