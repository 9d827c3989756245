"""The forward pass on CUDA: one fused kernel where there is a trusted and faster one, else two passes.

The two are the library's convolution and our epilogue.
"""

from __future__ import annotations

from torch import Tensor

from fastprune.ops.conv.fused import Channels, FusedGeometry, fused_conv
from fastprune.ops.conv.library import Geometry, convolve
from fastprune.ops.masked_act import masked_act


def convolve_on_cuda(
    x: Tensor, weight: Tensor, channels: Channels, geometry: Geometry, activation: str, *, saves: bool
) -> tuple[Tensor, Tensor | None]:
    """``mask * act(scale * conv(x, weight) + shift)``, and what the backward pass needs if ``saves``.

    Args:
        x: ``[N, C, H, W]`` on CUDA, the first channels of a wider tensor or not.
        weight: ``[K, C / groups, R, S]``, a part of a larger one or not.
        channels: scale, shift and mask, ``[K]`` each, or None.
        geometry: Stride, padding, dilation, groups.
        activation: One of ``fastprune.ops.activations.ACTIVATIONS``.
        saves: Whether the second result is wanted.
    """
    moves = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)

    def library(x: Tensor, weight: Tensor, channels: Channels) -> tuple[Tensor, ...]:
        z = convolve(x, weight, None, geometry)
        y, saved = masked_act(z, *channels, activation=activation, want_saved=saves)
        return (y, saved) if saves else (y,)

    y, *saved = fused_conv(x, weight, channels, FusedGeometry(*moves, activation, saves), library)
    return y, saved[0] if saves else None
