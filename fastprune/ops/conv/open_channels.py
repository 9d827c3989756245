"""Convolutions by the library of which the first channels are open; closed ones are neither read nor computed.

A closed input counts as zero, whatever it holds; a closed output is not computed. With several groups, whole groups are
left out, and a group with an open channel is computed as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastprune.ops.arguments import vector_dtype
from fastprune.ops.conv.library import Geometry, convolve, input_gradient, weight_gradient
from fastprune.ops.conv.packed import PackedWeight
from fastprune.ops.layout import layout_of
from fastprune.ops.masked_act import masked_act, masked_act_backward


@dataclass(frozen=True)
class ConvLayer:
    """A convolution and what follows it: ``act(scale * conv(x, weight) + shift)``.

    Args:
        weight: ``[K, C / groups, R, S]``.
        scale: ``[K]``; with ``shift`` it stands for the bias and a frozen batch norm. ``None``: 1.
        shift: ``[K]``; ``None``: 0.
        geometry: Stride, padding, dilation, groups.
        activation: One of ``fastprune.ops.activations.ACTIVATIONS``.
        packed: ``scale * weight`` in the order in which our own kernel reads it, where that computes the convolution.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    geometry: Geometry
    activation: str
    packed: PackedWeight | None = None


def convolve_open(x: Tensor, layer: ConvLayer, residual: Tensor | None, open_in: int, rows: int) -> Tensor:
    """Compute the first ``rows`` channels of ``act(scale * conv(x, weight) + shift + residual)``.

    Only the first ``open_in`` channels of x are read; vectors and residual may be longer than ``rows``.
    """
    size = layer.geometry.output_size(x.shape, layer.weight.shape)
    x, weight, geometry, computed = open_part(x, layer.weight, layer.geometry, open_in, rows)
    weight = fold(weight, None if layer.scale is None else layer.scale[: weight.shape[0]])
    shift = None if layer.shift is None else layer.shift[:rows]
    residual = None if residual is None else residual[:, :rows]
    if computed == weight.shape[0] == rows > 0:
        shift = None if shift is None else shift.to(x.dtype)
        return convolve(make_dense(x), weight, shift, geometry, layer.activation, residual)
    # The rest are outputs of closed groups: convolutions of zero.
    z = torch.zeros([size[0], rows, *size[2:]], dtype=x.dtype, device=x.device).to(memory_format=layout_of(x))
    if computed:
        z[:, :computed] = convolve(make_dense(x), weight, None, geometry)[:, :computed]
    if residual is not None:
        z += residual
    if shift is None and layer.activation == "identity":
        return z
    return masked_act(z, shift=shift, activation=layer.activation)[0]


def input_gradient_of_open(dz: Tensor, x_size: list[int], weight: Tensor, geometry: Geometry) -> Tensor:
    """Compute the gradient of ``conv(x, weight)`` for all of x; outputs behind ``dz`` ``[N, open, P, Q]`` have none."""
    outputs, groups = weight.shape[0], geometry.groups
    if dz.shape[1] == outputs:
        return input_gradient(dz, x_size, weight, geometry)
    if dz.shape[1] == 0:
        return widen(dz.new_empty([x_size[0], 0, *x_size[2:]]).contiguous(memory_format=layout_of(dz)), x_size[1])
    if groups == 1:
        return input_gradient(make_dense(dz), x_size, weight[: dz.shape[1]], geometry)
    per_group = outputs // groups
    open_groups = -(-dz.shape[1] // per_group)
    inputs = open_groups * weight.shape[1]
    dz, weight = widen(dz, open_groups * per_group), weight[: open_groups * per_group]
    dx = input_gradient(dz, [x_size[0], inputs, *x_size[2:]], weight, replace(geometry, groups=open_groups))
    return widen(dx, x_size[1])


def weight_gradient_of_open(dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, open_in: int) -> Tensor:
    """Compute the gradient for all of the weight; it is 0 for closed inputs, and for outputs behind ``dz``."""
    x, part, geometry, computed = open_part(x, weight, geometry, open_in, dz.shape[1])
    gradient = torch.zeros_like(weight)
    if computed:
        dz = widen(dz[:, :computed], part.shape[0])
        gradient[: part.shape[0], : part.shape[1]] = weight_gradient(dz, make_dense(x), part, geometry)
    return gradient


def activation_gradients(
    dy: Tensor,
    saved: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    activation: str,
    open_out: int,
    *,
    want_dz: bool,
    want_dmask: bool,
    want_dshift: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of ``y = mask * act(z)``, where the mask behind the first ``open_out`` channels is 0.

    Args:
        dy: ``[N, K, P, Q]``, gradient of ``y``.
        saved: ``[N, K, P, Q]``, what the forward pass saved.
        mask: ``[K]`` or None.
        scale: ``[K]``, multiplied into ``dz``, or None.
        activation: One of ``fastprune.ops.activations.ACTIVATIONS``.
        open_out: The number of open channels.
        want_dz: Whether to compute ``dz``.
        want_dmask: Whether to compute ``dmask``.
        want_dshift: Whether to compute ``dshift``.

    Returns:
        ``dz`` ``[N, open_out, P, Q]``, ``dmask`` ``[K]`` and ``dshift`` ``[open_out]``, None where not wanted.
    """
    dz, dmask, dshift, _ = masked_act_backward(
        dy[:, :open_out],
        saved[:, :open_out],
        mask=None if mask is None else mask[:open_out],
        scale=None if scale is None else scale[:open_out],
        activation=activation,
        want_dx=want_dz,
        want_dmask=want_dmask,
        want_dshift=want_dshift,
    )
    if dmask is not None:
        dmask = torch.cat([dmask, closed_mask_gradient(dy, saved, activation, open_out)])
    return dz, dmask, dshift


def closed_mask_gradient(dy: Tensor, saved: Tensor, activation: str, open_out: int) -> Tensor:
    """Compute the gradient of the mask behind the first ``open_out`` channels; what was masked there has gradient 0."""
    if open_out == dy.shape[1]:
        return dy.new_empty(0, dtype=vector_dtype(dy))
    closed = slice(open_out, None)
    _, dmask, _, _ = masked_act_backward(
        dy[:, closed], saved[:, closed], activation=activation, want_dx=False, want_dmask=True
    )
    assert dmask is not None
    return dmask


def open_part(
    x: Tensor, weight: Tensor, geometry: Geometry, open_in: int, rows: int
) -> tuple[Tensor, Tensor, Geometry, int]:
    """Cut out the convolution that the first ``rows`` outputs need, as far as they depend on open inputs.

    Returns:
        Its input, weight and geometry, and how many of the first ``rows`` outputs it computes.
    """
    if geometry.groups == 1:
        return x[:, :open_in], weight[:rows, :open_in], geometry, rows if open_in else 0
    inputs, outputs = weight.shape[1], weight.shape[0] // geometry.groups
    groups = min(-(-open_in // inputs), -(-rows // outputs))
    x = widen(x[:, : min(open_in, groups * inputs)], groups * inputs)
    return x, weight[: groups * outputs], replace(geometry, groups=groups), min(groups * outputs, rows)


def fold(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Scale the rows of a weight ``[K, …]``."""
    return weight if scale is None else (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def make_dense(x: Tensor) -> Tensor:
    """Return a view of some channels as a dense tensor, in the layout of the view."""
    return x.contiguous(memory_format=layout_of(x))


def widen(x: Tensor, channels: int) -> Tensor:
    """Append zeros to the channels of ``x`` ``[N, c, H, W]`` until there are ``channels``."""
    if x.shape[1] == channels:
        return x
    wide = torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    wide[:, : x.shape[1]] = x
    wide[:, x.shape[1] :] = 0
    return wide
