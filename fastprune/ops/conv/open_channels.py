"""Convolutions whose channels are open in a prefix alone: what is closed is neither read nor computed.

A closed input counts as zero whatever it holds; a closed output is not asked for. With several groups, whole groups are
left out, and a group in which a channel is open is computed as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprune.ops.activations import BOUNDS
from fastprune.ops.conv.cuda import convolve_on_cuda
from fastprune.ops.conv.library import Geometry, convolve, input_gradient, weight_gradient, weight_outweighs
from fastprune.ops.conv.packed import PackedWeight, algorithm_for, computes, pack
from fastprune.ops.conv.packed import convolve as packed_convolve
from fastprune.ops.layout import layout_of
from fastprune.ops.masked_act import masked_act


@dataclass(frozen=True)
class Layer:
    """A convolution and what stands behind it: ``act(scale * conv(x, weight) + shift)``.

    Scale and shift ``[K]`` stand for the convolution's bias and its frozen batch norm. ``packed`` holds ``scale *
    weight`` in the order in which our own kernel reads it, where that computes the convolution.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    geometry: Geometry
    activation: str
    packed: PackedWeight | None = None


def convolve_open(x: Tensor, layer: Layer, residual: Tensor | None, open_in: int, rows: int) -> Tensor:
    """The first ``rows`` channels of ``act(scale * conv(x, weight) + shift + residual)``.

    Of x only the first ``open_in`` channels are read; vectors and residual may be longer than ``rows``. With the weight
    packed the result has all channels, zeros behind ``rows``.
    """
    if layer.packed is not None and open_in > 0 and layer.activation in BOUNDS:
        x = x[:, :open_in]
        return packed_convolve(
            x, layer.packed, rows, shift=layer.shift, residual=residual, activation=layer.activation
        )[0]
    size = layer.geometry.output_size(x.shape, layer.weight.shape)
    x, weight, geometry, computed = open_part(x, layer.weight, layer.geometry, open_in, rows)
    weight = fold(weight, None if layer.scale is None else layer.scale[: weight.shape[0]])
    shift = None if layer.shift is None else layer.shift[:rows]
    residual = None if residual is None else residual[:, :rows]
    if computed == weight.shape[0] == rows > 0:
        shift = None if shift is None else shift.to(x.dtype)
        return convolve(dense(x), weight, shift, geometry, layer.activation, residual)
    # Behind them are the outputs of closed groups: convolutions of zero.
    z = torch.zeros([size[0], rows, *size[2:]], dtype=x.dtype, device=x.device).to(memory_format=layout_of(x))
    if computed:
        z[:, :computed] = convolve(dense(x), weight, None, geometry)[:, :computed]
    if residual is not None:
        z += residual
    return masked_act(z, shift=shift, activation=layer.activation)[0]


def open_outputs(
    x: Tensor, layer: Layer, mask: Tensor | None, residual: Tensor | None, open_in: int, open_out: int
) -> Tensor:
    """The first ``open_out`` channels of ``mask * act(scale * conv(x, weight) + shift + residual)``.

    There may be more, which are 0.
    """
    packed, activation, mask = layer.packed, layer.activation, None if mask is None else mask[:open_out]
    if packed is not None and open_in > 0 and activation in BOUNDS:
        x, shift = x[:, :open_in], layer.shift
        return packed_convolve(x, packed, open_out, shift=shift, mask=mask, residual=residual, activation=activation)[0]
    if x.is_cuda and residual is None and layer.geometry.groups == 1 and min(open_in, open_out) > 0:
        part = layer.weight[:open_out, :open_in]
        scale, shift = (None if vector is None else vector[:open_out] for vector in (layer.scale, layer.shift))
        x = x[:, :open_in]
        return convolve_on_cuda(x, part, (scale, shift, mask), layer.geometry, activation, saves=False)[0]
    if packed is not None:
        z = convolve_open(x, replace(layer, activation="identity"), residual, open_in, open_out)
        return masked_act(z[:, :open_out], mask=mask, activation=activation)[0]
    if mask is not None and residual is None and folds(mask, activation):
        padded = F.pad(mask, (0, layer.weight.shape[0] - open_out))
        scale = padded if layer.scale is None else layer.scale * padded
        layer = replace(layer, scale=scale, shift=None if layer.shift is None else layer.shift * padded)
        mask = None
    r = convolve_open(x, layer, residual, open_in, open_out)
    return r if mask is None else masked_act(r, mask=mask, activation="identity")[0]


def packed_once(x: Tensor, layer: Layer, open_in: int) -> Layer:
    """The layer with its weight packed for one call, where our kernel computes it and packing is the smaller part."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if not computes(x, layer.weight, layer.geometry) or weight_outweighs(layer.weight, pixels):
        return layer
    algorithm = algorithm_for(layer.weight, layer.geometry, open_in)
    return replace(layer, packed=pack(layer.weight, layer.geometry, scale=layer.scale, algorithm=algorithm))


def folds(mask: Tensor, activation: str) -> bool:
    """Whether ``mask * act(z)`` is ``act(mask * z)`` for every z. Only looked up where looking costs no waiting."""
    if mask.device.type != "cpu":
        return False
    if activation == "identity":
        return True
    if activation == "relu":
        return bool((mask >= 0).all())
    return bool(((mask == 0) | (mask == 1)).all())


def input_gradient_of_open(
    dz: Tensor, x_size: list[int], weight: Tensor, geometry: Geometry, packed: PackedWeight | None = None
) -> Tensor:
    """The gradient of ``conv(x, weight)`` for all of x; that of the outputs behind ``dz`` ``[N, open, P, Q]`` is 0."""
    outputs, groups = weight.shape[0], geometry.groups
    transposed = geometry.transposed(weight)
    pixels = dz.shape[0] * dz.shape[2] * dz.shape[3]
    once = packed is None and transposed is not None and not weight_outweighs(weight, pixels)
    if once and transposed is not None and computes(dz, weight, transposed):
        algorithm = algorithm_for(weight, transposed, dz.shape[1])
        packed = pack(weight, transposed, transposed=True, algorithm=algorithm)
    if packed is not None and dz.shape[1] > 0:
        return packed_convolve(dz, packed, x_size[1])[0]
    if dz.shape[1] == outputs:
        return input_gradient(dz, x_size, weight, geometry)
    if dz.shape[1] == 0:
        return widened(dz.new_empty([x_size[0], 0, *x_size[2:]]).contiguous(memory_format=layout_of(dz)), x_size[1])
    if groups == 1:
        return input_gradient(dense(dz), x_size, weight[: dz.shape[1]], geometry)
    per_group = outputs // groups
    open_groups = -(-dz.shape[1] // per_group)
    inputs = open_groups * weight.shape[1]
    dz, weight = widened(dz, open_groups * per_group), weight[: open_groups * per_group]
    dx = input_gradient(dz, [x_size[0], inputs, *x_size[2:]], weight, replace(geometry, groups=open_groups))
    return widened(dx, x_size[1])


def weight_gradient_of_open(dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, open_in: int) -> Tensor:
    """The gradient for all of the weight; it is 0 where the input is closed, or the output, behind ``dz``."""
    x, part, geometry, computed = open_part(x, weight, geometry, open_in, dz.shape[1])
    gradient = torch.zeros_like(weight)
    if computed:
        dz = widened(dz[:, :computed], part.shape[0])
        gradient[: part.shape[0], : part.shape[1]] = weight_gradient(dz, dense(x), part, geometry)
    return gradient


def open_part(
    x: Tensor, weight: Tensor, geometry: Geometry, open_in: int, rows: int
) -> tuple[Tensor, Tensor, Geometry, int]:
    """The convolution that computes what depends on x of the first ``rows`` outputs, and how many of them these are."""
    if geometry.groups == 1:
        return x[:, :open_in], weight[:rows, :open_in], geometry, rows if open_in else 0
    inputs, outputs = weight.shape[1], weight.shape[0] // geometry.groups
    groups = min(-(-open_in // inputs), -(-rows // outputs))
    x = widened(x[:, : min(open_in, groups * inputs)], groups * inputs)
    return x, weight[: groups * outputs], replace(geometry, groups=groups), min(groups * outputs, rows)


def fold(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weight ``[K, …]`` with its rows scaled."""
    return weight if scale is None else (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def dense(x: Tensor) -> Tensor:
    """A view of some channels as a tensor of its own, in the layout that it has."""
    return x.contiguous(memory_format=layout_of(x))


def widened(x: Tensor, channels: int) -> Tensor:
    """``x`` ``[N, c, H, W]`` with zeros behind its channels, as many as there have to be."""
    if x.shape[1] == channels:
        return x
    wide = torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    wide[:, : x.shape[1]] = x
    wide[:, x.shape[1] :] = 0
    return wide
