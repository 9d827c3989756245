"""Convolution, frozen batch norm, activation and channel mask as one operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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
from fastprune.ops.conv.cuda import convolve_on_cuda
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.open_channels import (
    Layer,
    convolve_open,
    fold,
    input_gradient_of_open,
    open_outputs,
    packed_once,
    weight_gradient_of_open,
    widened,
)
from fastprune.ops.layout import layout_of
from fastprune.ops.library import refuse_transforms, register
from fastprune.ops.masked_act import masked_act, masked_act_backward

BatchNorm = tuple[Tensor | None, Tensor | None, Tensor, Tensor]


def masked_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn: BatchNorm | None,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = "relu",
    eps: float = 1e-5,
    open_in: int | None = None,
    open_out: int | None = None,
) -> Tensor:
    r"""``mask * act(bn(conv(x)) + residual)`` with frozen statistics, in one operator.

    .. math:: y_k = m_k \; \mathrm{act}\left(\gamma_k \frac{(W * x)_k + b_k - \mu_k}{\sqrt{\sigma_k^2 + \epsilon}}
        + \beta_k + s_k\right)

    Gradients go to whatever requires one. That of the mask is :math:`\sum r_k \, \partial L / \partial y_k` over
    batch and pixels, with :math:`r` the activation before the mask: a closed channel (:math:`m_k = 0`) receives it,
    too, as straight-through estimators need.

    **Skipping.** Where the caller knows that all channels behind the first ``open_in`` (``open_out``) are closed, they
    are neither read nor, with nobody asking for gradients, computed: forward reduces over open inputs, the gradient
    of ``x`` over open outputs. It stays the gradient of the whole convolution: closed inputs receive theirs.

    Args:
        x: ``[N, C, H, W]``, float32, float64, bfloat16 or float16; channels_last is the faster layout, and kept.
        weight: ``[K, C / groups, R, S]``, dtype and device of ``x``.
        bn: ``(weight, bias, running_mean, running_var)``, each ``[K]``, the first two possibly None; or None for a
            convolution without batch norm. As batch norm in eval mode: statistics are read, never updated.
        mask: ``[K]``; None: all ones.
        bias: That of the convolution, ``[K]``.
        residual: What is added before the activation, shaped like the result.
        stride: Pixels, one number or (vertical, horizontal), as are padding and dilation.
        padding: Zeros on each side.
        dilation: Distance of the kernel's taps.
        groups: Of the convolution.
        activation: ``"identity"`` (or None), ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hardswish"``.
        eps: That of the batch norm.
        open_in: How many channels of ``x``, counted from the first, may be open; the rest counts as zero.
        open_out: How many channels of the result may be open; the mask of the rest counts as zero.

    Returns:
        ``[N, K, P, Q]``, dtype and layout of ``x``.

    Raises:
        TypeError: A tensor of another dtype than ``x``, or no floating-point one. The vectors ``[K]`` may also be
            float32 where ``x`` has half precision.
        ValueError: Shapes, devices, an activation or a count that do not fit.

    Source: DMC (Gao et al., CVPR 2020), §3.2, and DDNP (Gao et al., ECCV 2022), §3.4, for where the mask sits and
    what gradient it gets.

    Example:
        >>> import torch
        >>> from fastprune import ops
        >>> x, weight = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 3, 3)
        >>> statistics = torch.zeros(2), torch.ones(2)  # mean and variance
        >>> mask = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> y = ops.masked_conv_bn_act(x, weight, (None, None, *statistics), mask, eps=0.0)
        >>> y.flatten()
        tensor([18.,  0.], grad_fn=<ViewBackward0>)
        >>> torch.autograd.grad(y.sum(), mask)[0]
        tensor([18., 18.])
    """
    refuse_transforms("masked_conv_bn_act")
    geometry = geometry_of(stride, padding, dilation, groups)
    check_images(x, weight, geometry)
    activation = checked_activation(activation)
    outputs = weight.shape[0]
    if residual is not None:
        check_residual(residual, x, geometry.output_size(x.shape, weight.shape))
    mask = None if mask is None else vector("mask", mask, outputs, x)
    scale, shift = frozen_affine(bn, bias, eps, outputs, x)
    open_in = count("open_in", open_in, x.shape[1])
    open_out = count("open_out", open_out, outputs)
    if open_out < outputs and mask is None:
        mask = torch.ones(outputs, dtype=vector_dtype(x), device=x.device)
    y: Tensor = _MaskedConv.apply(x, weight, scale, shift, mask, residual, geometry, activation, open_in, open_out)
    return y


class _MaskedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        mask: Tensor | None,
        residual: Tensor | None,
        geometry: Geometry,
        activation: str,
        open_in: int,
        open_out: int,
    ) -> Tensor:
        moves = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        trains = any(ctx.needs_input_grad)
        y: Tensor
        y, saved = torch.ops.fastprune._masked_conv(
            x, weight, scale, shift, mask, residual, *moves, activation, open_in, open_out, trains
        )
        if trains:
            needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
            saved_is_y = mask is None and activation in DIFFERENTIABLE_BY_VALUE
            ctx.save_for_backward(x if needs_x else None, weight, scale, mask, y if saved_is_y else saved)
            ctx.x_size, ctx.moves, ctx.activation, ctx.open = list(x.shape), moves, activation, (open_in, open_out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, mask, saved = ctx.saved_tensors
        gradients = torch.ops.fastprune._masked_conv_backward(
            grad_outputs[0],
            x,
            weight,
            scale,
            mask,
            saved,
            ctx.x_size,
            *ctx.moves,
            ctx.activation,
            *ctx.open,
            list(ctx.needs_input_grad[:6]),
        )
        wanted = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None


def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    open_in: int,
    open_out: int,
    trains: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y, and what the backward pass needs where that is not y itself."""
    layer = Layer(weight, scale, shift, geometry_of(stride, padding, dilation, groups), activation)
    layer, nothing = packed_once(x, layer, open_in), x.new_empty(0)
    if not trains:
        return widened(open_outputs(x, layer, mask, residual, open_in, open_out), weight.shape[0]), nothing
    y, saved = forward_for_training(x, layer, mask, residual, open_in, open_out)
    return y, nothing if saved is None else saved


def forward_for_training(
    x: Tensor, layer: Layer, mask: Tensor | None, residual: Tensor | None, open_in: int, open_out: int
) -> tuple[Tensor, Tensor | None]:
    """y, and what the backward pass needs where that is not y itself."""
    outputs, activation = layer.weight.shape[0], layer.activation
    by_value = activation in DIFFERENTIABLE_BY_VALUE
    saves = mask is not None or not by_value
    if mask is not None and open_out < outputs:
        mask = F.pad(mask[:open_out], (0, outputs - open_out))
    if layer.packed is not None and open_in > 0 and by_value:
        rest: dict[str, Any] = {"residual": residual, "activation": activation, "saves": saves}
        return packed_conv.convolve(x[:, :open_in], layer.packed, outputs, shift=layer.shift, mask=mask, **rest)
    if x.is_cuda and residual is None and layer.geometry.groups == 1 and open_in > 0:
        channels, part = (layer.scale, layer.shift, mask), layer.weight[:, :open_in]
        return convolve_on_cuda(x[:, :open_in], part, channels, layer.geometry, activation, saves=saves)
    before, after = (activation, "identity") if by_value else ("identity", activation)
    saved = convolve_open(x, replace(layer, activation=before), residual, open_in, outputs)
    return (masked_act(saved, mask=mask, activation=after)[0], saved) if saves else (saved, None)


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    x_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    open_in: int,
    open_out: int,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of x, weight, scale, shift, mask and residual; those not wanted are empty."""
    for_x, for_weight, for_scale, for_shift, for_mask, for_residual = wanted
    outputs, geometry = weight.shape[0], geometry_of(stride, padding, dilation, groups)
    dy = dy.contiguous(memory_format=layout_of(saved))
    # The scale goes into dz or into the weight, whichever nobody else needs as it is.
    into_dz = scale is not None and not (for_weight or for_scale or for_residual)
    dz, dmask, dshift, _ = masked_act_backward(
        dy[:, :open_out],
        saved[:, :open_out],
        mask=None if mask is None else mask[:open_out],
        scale=scale[:open_out] if into_dz and scale is not None else None,
        activation=activation,
        want_dx=for_x or for_weight or for_scale or for_residual,
        want_dmask=for_mask,
        want_dshift=for_shift,
    )
    gradients: list[Tensor | None] = [None] * 6
    if for_x and dz is not None:
        gradients[0] = input_gradient_of_open(dz, x_size, weight if into_dz else fold(weight, scale), geometry)
    if (for_weight or for_scale) and x is not None and dz is not None:
        if for_scale:  # a sum over the whole kernel, in which the roundings of half precision would pile up
            wide_dz, wide_x, wide_weight = (tensor.to(vector_dtype(x)) for tensor in (dz, x, weight))
            per_weight = weight_gradient_of_open(wide_dz, wide_x, wide_weight, geometry, open_in)
            gradients[2] = (per_weight * weight).sum((1, 2, 3))
        else:
            per_weight = weight_gradient_of_open(dz, x, weight, geometry, open_in)
        gradients[1] = fold(per_weight, scale).to(weight.dtype)
    if dshift is not None:
        gradients[3] = F.pad(dshift, (0, outputs - open_out))
    if dmask is not None:
        gradients[4] = torch.cat([dmask, closed_mask_gradient(dy, saved, activation, open_out)])
    if for_residual and dz is not None:
        gradients[5] = widened(dz, outputs)
    return [dy.new_empty(0) if gradient is None else gradient for gradient in gradients]


def closed_mask_gradient(dy: Tensor, saved: Tensor, activation: str, open_out: int) -> Tensor:
    """The gradient of the mask behind the first ``open_out`` channels, whose own gradient is 0."""
    if open_out == dy.shape[1]:
        return dy.new_empty(0, dtype=vector_dtype(dy))
    closed = slice(open_out, None)
    _, dmask, _, _ = masked_act_backward(
        dy[:, closed], saved[:, closed], activation=activation, want_dx=False, want_dmask=True
    )
    assert dmask is not None
    return dmask


def _fake(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    _residual, *moves, activation, _open_in, _open_out, trains = rest
    size = geometry_of(*moves).output_size(x.shape, weight.shape)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    saves = trains and (mask is not None or activation not in DIFFERENTIABLE_BY_VALUE)
    return y, torch.empty_like(y) if saves else x.new_empty(0)


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    x_size: list[int],
    *moves: Any,
) -> list[Tensor]:
    wanted = moves[-1]
    layout, vectors = layout_of(saved), dy.new_empty(weight.shape[0], dtype=vector_dtype(dy))
    shaped = (
        torch.empty(x_size, dtype=dy.dtype, device=dy.device, memory_format=layout),
        torch.empty_like(weight),
        *(torch.empty_like(vectors) for _ in range(3)),
        torch.empty_like(saved, memory_format=layout),
    )
    return [tensor if wants else dy.new_empty(0) for tensor, wants in zip(shaped, wanted, strict=True)]


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups, str activation, SymInt open_in, SymInt open_out"
register(
    "_masked_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? mask, Tensor? residual, "
    f"{_GEOMETRY}, bool trains) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
register(
    "_masked_conv_backward(Tensor dy, Tensor? x, Tensor weight, Tensor? scale, Tensor? mask, Tensor saved, "
    f"SymInt[] x_size, {_GEOMETRY}, bool[] wanted) -> Tensor[]",
    _backward,
    _fake_backward,
)
