"""The choice of the kernel that computes a convolution and what follows it.

Our own kernel on the CPU and the fused one on CUDA apply scale, shift, activation and mask in one pass; the library's
convolution is followed by passes over memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from fastprune.ops.activations import BOUNDS, DIFFERENTIABLE_BY_VALUE
from fastprune.ops.conv import library, packed
from fastprune.ops.conv.fused import FusedGeometry, fused_conv, two_passes
from fastprune.ops.conv.library import Geometry, weight_outweighs
from fastprune.ops.conv.open_channels import ConvLayer, convolve_open, input_gradient_of_open
from fastprune.ops.conv.packed import PackedWeight
from fastprune.ops.conv.triton_conv import is_depthwise
from fastprune.ops.masked_act import masked_act, masked_act_in_place, masked_act_saving_in_place


def convolve_for_inference(
    x: Tensor, layer: ConvLayer, mask: Tensor | None, residual: Tensor | None, open_in: int, open_out: int
) -> Tensor:
    """Compute the first ``open_out`` channels of ``mask * act(scale * conv(x, weight) + shift + residual)``.

    There may be more channels, which are 0.
    """
    mask = None if mask is None else mask[:open_out]
    return _convolve(x, layer, mask, residual, open_in, open_out, saves=False)[0]


def convolve_for_training(
    x: Tensor, layer: ConvLayer, mask: Tensor | None, residual: Tensor | None, open_in: int, open_out: int
) -> tuple[Tensor, Tensor | None]:
    """Compute y of all channels, and what the backward pass needs if that is not y itself."""
    rows = layer.weight.shape[0]
    if mask is not None and open_out < rows:
        mask = F.pad(mask[:open_out], (0, rows - open_out))
    saves = mask is not None or layer.activation not in DIFFERENTIABLE_BY_VALUE
    return _convolve(x, layer, mask, residual, open_in, rows, saves=saves)


def _convolve(
    x: Tensor, layer: ConvLayer, mask: Tensor | None, residual: Tensor | None, open_in: int, rows: int, *, saves: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the first ``rows`` outputs from the first ``open_in`` inputs, with ``saves`` what gradients need, too."""
    if layer.packed is not None and open_in > 0:
        return _by_our_kernel(x[:, :open_in], layer, layer.packed, mask, residual, rows, saves=saves)
    if x.is_cuda and _may_fuse(x, layer, open_in, rows):
        return _by_fused_kernel(x[:, :open_in], layer, mask, residual, rows, saves=saves)
    if x.is_cuda or (residual is not None and not library.adds(x, layer.activation)):
        return _by_two_passes(x, layer, mask, residual, open_in, rows, saves=saves, folds=not x.is_cuda)
    return _by_library(x, layer, mask, residual, open_in, rows, saves=saves)


def _may_fuse(x: Tensor, layer: ConvLayer, open_in: int, rows: int) -> bool:
    """Return whether the convolution is dense, or depthwise with all channels open."""
    if layer.geometry.groups == 1:
        return min(open_in, rows) > 0
    return open_in == rows == x.shape[1] and is_depthwise(x.shape[1], layer.weight, layer.geometry)


def _by_our_kernel(
    x: Tensor,
    layer: ConvLayer,
    weight: PackedWeight,
    mask: Tensor | None,
    residual: Tensor | None,
    rows: int,
    *,
    saves: bool,
) -> tuple[Tensor, Tensor | None]:
    shift, activation = layer.shift, layer.activation
    if activation in BOUNDS:
        return packed.convolve(
            x, weight, rows, shift=shift, mask=mask, residual=residual, activation=activation, saves=saves
        )
    z, _ = packed.convolve(x, weight, rows, shift=shift, residual=residual)
    return masked_act(z[:, :rows], mask=mask, activation=activation)[0], z if saves else None


def _by_fused_kernel(
    x: Tensor, layer: ConvLayer, mask: Tensor | None, residual: Tensor | None, rows: int, *, saves: bool
) -> tuple[Tensor, Tensor | None]:
    weight = layer.weight[:rows, : x.shape[1]]  # of a depthwise layer: all
    scale, shift = (None if vector is None else vector[:rows] for vector in (layer.scale, layer.shift))

    geometry = FusedGeometry(*layer.geometry.numbers, layer.activation, saves)
    residual = None if residual is None else residual[:, :rows]
    fallback = partial(two_passes, geometry=geometry)
    y, *saved = fused_conv(x, weight, (scale, shift, mask), geometry, fallback, residual)
    return y, saved[0] if saves else None


def _by_two_passes(
    x: Tensor,
    layer: ConvLayer,
    mask: Tensor | None,
    residual: Tensor | None,
    open_in: int,
    rows: int,
    *,
    saves: bool,
    folds: bool,
) -> tuple[Tensor, Tensor | None]:
    """Leave what follows the convolution to one pass.

    ``folds``: scale and shift stay with the convolution, for which oneDNN takes no pass, unlike cuDNN.
    """
    product, scale, shift = replace(layer, activation="identity"), None, None
    if not folds:
        product = replace(product, scale=None, shift=None)
        scale, shift = (None if vector is None else vector[:rows] for vector in (layer.scale, layer.shift))
    z = convolve_open(x, product, None, open_in, rows)
    residual = None if residual is None else residual[:, :rows]
    if saves:
        return masked_act_saving_in_place(z, scale, shift, mask, residual=residual, activation=layer.activation)
    return masked_act_in_place(z, scale, shift, mask, residual=residual, activation=layer.activation), None


def _by_library(
    x: Tensor, layer: ConvLayer, mask: Tensor | None, residual: Tensor | None, open_in: int, rows: int, *, saves: bool
) -> tuple[Tensor, Tensor | None]:
    if saves:
        # The pass that applies the mask applies the activation, too.
        z = convolve_open(x, replace(layer, activation="identity"), residual, open_in, rows)
        return masked_act_saving_in_place(z, mask=mask, activation=layer.activation)
    if mask is not None and residual is None and mask_folds(mask, layer.activation):
        padded = F.pad(mask, (0, layer.weight.shape[0] - rows))
        scale = padded if layer.scale is None else layer.scale * padded
        layer = replace(layer, scale=scale, shift=None if layer.shift is None else layer.shift * padded)
        mask = None
    r = convolve_open(x, layer, residual, open_in, rows)
    return (r if mask is None else masked_act(r, mask=mask, activation="identity")[0]), None


def mask_folds(mask: Tensor, activation: str) -> bool:
    """Return whether ``mask * act(z)`` is ``act(mask * z)`` for every z.

    On CUDA, where a look at the mask would wait for the device, the answer is False.
    """
    if mask.device.type != "cpu":
        return False
    if activation == "identity":
        return True
    if activation == "relu":
        return bool((mask >= 0).all())
    return bool(((mask == 0) | (mask == 1)).all())


def pack_once(x: Tensor, layer: ConvLayer, open_in: int) -> ConvLayer:
    """Pack the layer's weight for one call, if our kernel computes it and packing is the smaller part of the work."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if not packed.computes(x, layer.weight, layer.geometry) or weight_outweighs(layer.weight, pixels):
        return layer
    algorithm = packed.algorithm_for(layer.weight, layer.geometry, open_in)
    return replace(layer, packed=packed.pack(layer.weight, layer.geometry, scale=layer.scale, algorithm=algorithm))


def input_gradient(
    dz: Tensor, x_size: list[int], weight: Tensor, geometry: Geometry, transposed: PackedWeight | None = None
) -> Tensor:
    """Compute the gradient of ``conv(x, weight)`` for all of x.

    Args:
        dz: ``[N, open, P, Q]``; the gradient of outputs behind it is 0.
        x_size: ``[N, C, H, W]``.
        weight: ``[K, C / groups, R, S]``.
        geometry: Stride, padding, dilation, groups.
        transposed: The weight packed for this; None: it is packed for one call where that is faster.
    """
    if transposed is None:
        transposed = _pack_transposed_once(dz, weight, geometry)
    if transposed is not None and dz.shape[1] > 0:
        return packed.convolve(dz, transposed, x_size[1])[0]
    return input_gradient_of_open(dz, x_size, weight, geometry)


def _pack_transposed_once(dz: Tensor, weight: Tensor, geometry: Geometry) -> PackedWeight | None:
    transposed = geometry.transposed(weight)
    if transposed is None or weight_outweighs(weight, dz.shape[0] * dz.shape[2] * dz.shape[3]):
        return None
    if not packed.computes(dz, weight, transposed):
        return None
    algorithm = packed.algorithm_for(weight, transposed, dz.shape[1])
    return packed.pack(weight, transposed, transposed=True, algorithm=algorithm)
