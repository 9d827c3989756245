"""Convolution, frozen batch norm, activation and channel mask as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastprune.ops.activations import DIFFERENTIABLE_BY_VALUE, check_activation
from fastprune.ops.arguments import check_vector, vector_dtype
from fastprune.ops.conv.arguments import (
    FrozenBatchNorm,
    check_count,
    check_images,
    check_residual,
    fold_batch_norm,
    make_geometry,
)
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.open_channels import (
    ConvLayer,
    activation_gradients,
    fold,
    weight_gradient_of_open,
    widen,
)
from fastprune.ops.conv.route import convolve_for_inference, convolve_for_training, input_gradient, pack_once
from fastprune.ops.layout import layout_of
from fastprune.ops.library import refuse_transforms, register


def masked_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn: FrozenBatchNorm | None,
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
    r"""Compute ``mask * act(bn(conv(x)) + residual)`` with frozen statistics, in one operator.

    .. math:: y_k = m_k \; \mathrm{act}\left(\gamma_k \frac{(W * x)_k + b_k - \mu_k}{\sqrt{\sigma_k^2 + \epsilon}}
        + \beta_k + s_k\right)

    Every tensor that requires a gradient receives one. That of the mask is
    :math:`\sum r_k \, \partial L / \partial y_k` over batch and pixels, with :math:`r` the activation before the
    mask: a closed channel (:math:`m_k = 0`) receives it as well, as straight-through estimators need. NaN goes through
    every activation.

    **Skipping.** If all channels behind the first ``open_in`` (``open_out``) are closed, they are not read and, unless
    something requires a gradient, not computed: forward sums over open inputs, the gradient of ``x`` over open outputs.
    It is still the gradient of the whole convolution: closed inputs receive theirs.

    Args:
        x: ``[N, C, H, W]``, float32, float64, bfloat16 or float16; channels_last is faster.
        weight: ``[K, C / groups, R, S]``, dtype and device of ``x``.
        bn: ``(weight, bias, running_mean, running_var)``, each ``[K]``, the first two possibly None; or None for a
            convolution without batch norm. As batch norm in eval mode, it reads the statistics and does not update
            them.
        mask: ``[K]``; None: all ones.
        bias: Bias of the convolution, ``[K]``.
        residual: ``[N, K, P, Q]``, added before the activation; dtype of ``x``.
        stride: Pixels, one number or (vertical, horizontal), as are padding and dilation.
        padding: Zeros on each side.
        dilation: Distance of the kernel's taps.
        groups: Number of groups of channels.
        activation: ``"identity"`` (or None), ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hardswish"``.
        eps: Number added to the variance of the batch norm.
        open_in: How many channels of ``x``, counted from the first, may be open; the others count as zero.
        open_out: How many channels of the result may be open; the mask of the others counts as zero.

    Returns:
        ``[N, K, P, Q]``, dtype and layout of ``x``.

    Raises:
        TypeError: A tensor has another dtype than ``x``, or is not a dense floating-point tensor. The vectors ``[K]``
            may also be float32 if ``x`` has half precision.
        ValueError: A shape, a device, an activation or a count does not fit.
        RuntimeError: The call is under ``torch.func`` (``vmap``, ``grad`` and their like).

    Source: DMC (Gao et al., CVPR 2020), §3.2, and DDNP (Gao et al., ECCV 2022), §3.4, for the place of the mask and its
    gradient.

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
    geometry = make_geometry(stride, padding, dilation, groups)
    check_images(x, weight, geometry)
    activation = check_activation(activation)
    outputs = weight.shape[0]
    if residual is not None:
        check_residual(residual, x, geometry.output_size(x.shape, weight.shape))
    mask = None if mask is None else check_vector("mask", mask, x, outputs)
    scale, shift = fold_batch_norm(bn, bias, eps, outputs, x)
    open_in = check_count("open_in", open_in, x.shape[1])
    open_out = check_count("open_out", open_out, outputs)
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
        options = (*geometry.numbers, activation, open_in, open_out)
        trains = any(ctx.needs_input_grad)
        y: Tensor
        y, saved = torch.ops.fastprune._masked_conv(x, weight, scale, shift, mask, residual, *options, trains)
        if trains:
            needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
            saved_is_y = mask is None and activation in DIFFERENTIABLE_BY_VALUE
            ctx.save_for_backward(x if needs_x else None, weight, scale, mask, y if saved_is_y else saved)
            ctx.x_size, ctx.options = list(x.shape), options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[:6]
        gradients = torch.ops.fastprune._masked_conv_backward(
            grad_outputs[0], *tensors, ctx.x_size, *ctx.options, list(wanted)
        )
        return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), *[None] * 4


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
    """Compute y, and what the backward pass needs if that is not y itself."""
    layer = ConvLayer(weight, scale, shift, make_geometry(stride, padding, dilation, groups), activation)
    layer, nothing = pack_once(x, layer, open_in), x.new_empty(0)
    if not trains:
        y = convolve_for_inference(x, layer, mask, residual, open_in, open_out)
        return widen(y, weight.shape[0]), nothing
    y, saved = convolve_for_training(x, layer, mask, residual, open_in, open_out)
    return y, nothing if saved is None else saved


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
    """Compute the gradients of x, weight, scale, shift, mask and residual; those not wanted are empty."""
    for_x, for_weight, for_scale, for_shift, for_mask, for_residual = wanted
    outputs, geometry = weight.shape[0], make_geometry(stride, padding, dilation, groups)
    dy = dy.contiguous(memory_format=layout_of(saved))
    # The scale goes into dz, unless another gradient needs dz unscaled: then it goes into the weight.
    into_dz = not (for_weight or for_scale or for_residual)
    dz, dmask, dshift = activation_gradients(
        dy, saved, mask, scale if into_dz else None, activation, open_out,
        want_dz=any((for_x, for_weight, for_scale, for_residual)), want_dmask=for_mask, want_dshift=for_shift,
    )  # fmt: skip
    dx = dweight = dscale = None
    if for_x and dz is not None:
        dx = input_gradient(dz, x_size, weight if into_dz else fold(weight, scale), geometry)
    if (for_weight or for_scale) and dz is not None and x is not None:
        dweight, dscale = _weight_gradients(dz, x, weight, scale, geometry, open_in, for_scale)
    dshift = None if dshift is None else F.pad(dshift, (0, outputs - open_out))
    dresidual = widen(dz, outputs) if for_residual and dz is not None else None
    gradients = (dx, dweight, dscale, dshift, dmask, dresidual)
    return [dy.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _weight_gradients(
    dz: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, geometry: Geometry, open_in: int, for_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of the weight and of the scale."""
    if not for_scale:
        return fold(weight_gradient_of_open(dz, x, weight, geometry, open_in), scale).to(weight.dtype), None
    # A sum over the whole kernel, in which the roundings of half precision would pile up.
    wide_dz, wide_x, wide_weight = (tensor.to(vector_dtype(x)) for tensor in (dz, x, weight))
    per_weight = weight_gradient_of_open(wide_dz, wide_x, wide_weight, geometry, open_in)
    return fold(per_weight, scale).to(weight.dtype), (per_weight * weight).sum((1, 2, 3))


def _fake_forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    _residual, *geometry, activation, _open_in, _open_out, trains = rest
    size = make_geometry(*geometry).output_size(x.shape, weight.shape)
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
    *options: Any,
) -> list[Tensor]:
    layout, vectors = layout_of(saved), dy.new_empty(weight.shape[0], dtype=vector_dtype(dy))
    gradients = (
        torch.empty(x_size, dtype=dy.dtype, device=dy.device, memory_format=layout),
        torch.empty_like(weight),
        *(torch.empty_like(vectors) for _ in range(3)),
        torch.empty_like(saved, memory_format=layout),
    )
    wanted = options[-1]
    return [gradient if want else dy.new_empty(0) for gradient, want in zip(gradients, wanted, strict=True)]


_OPTIONS = "int[] stride, int[] padding, int[] dilation, int groups, str activation, SymInt open_in, SymInt open_out"
register(
    "_masked_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? mask, Tensor? residual, "
    f"{_OPTIONS}, bool trains) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
register(
    "_masked_conv_backward(Tensor dy, Tensor? x, Tensor weight, Tensor? scale, Tensor? mask, Tensor saved, "
    f"SymInt[] x_size, {_OPTIONS}, bool[] wanted) -> Tensor[]",
    _backward,
    _fake_backward,
)
