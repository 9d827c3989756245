"""Our own convolution on the CPU: float32, channels_last, weights packed for it.

It beats the library where it saves work: 3x3 kernels by Winograd's F(2x2, 3x3), open channels as prefixes that are
read and written in place, the mask and both results in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune import _C
from fastprune.ops.activations import BOUNDS
from fastprune.ops.convolution import Geometry
from fastprune.ops.layout import empty_rows, has_rows, layout_of

WINOGRAD_CHANNELS = 12
"""With fewer inputs, transforming costs more than multiplying saves. Measured for 16 and 64 outputs: with 4 inputs 0.65
and 0.8 times as fast as the direct algorithm, with 8 0.8 and 0.9, with 12 0.9 and 1.05, with 16 1.0 and 1.2 on AVX-512;
on AVX2 the same for 16 outputs, and for 64 faster from 4 on."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[K, C, R, S]`` in the order that the kernel reads it."""

    data: Tensor
    size: tuple[int, ...]
    geometry: Geometry
    algorithm: str
    instructions: str


def best_instructions() -> str | None:
    """What the kernels use on this processor; None where they are not written for it."""
    return next(iter(_C.masked_conv_instructions()), None)


def computes(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether this convolution is one of ours."""
    return takes(x, weight, geometry) and layout_of(x) == torch.channels_last


def takes(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether it would be one if x were channels_last."""
    return (
        best_instructions() is not None
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and (geometry.groups == 1 or is_depthwise(weight, geometry))
        and all(geometry.padding[d] <= geometry.dilation[d] * (weight.shape[2 + d] - 1) for d in (0, 1))
    )


def is_depthwise(weight: Tensor, geometry: Geometry) -> bool:
    """Whether each output reads one input, by a kernel of a size that ours takes."""
    channels, inputs, *kernel = weight.shape
    return geometry.groups == channels and inputs == 1 and math.prod(kernel) <= _C.depthwise_taps


def algorithm_for(weight: Tensor, geometry: Geometry, channels: int) -> str:
    """The fastest way to a convolution that reads ``channels`` inputs."""
    if geometry.groups > 1:
        return "depthwise"
    square = (geometry.stride, geometry.dilation, tuple(weight.shape[2:])) == ((1, 1), (1, 1), (3, 3))
    return "winograd" if square and channels >= WINOGRAD_CHANNELS else "direct"


def pack(
    weight: Tensor,
    geometry: Geometry,
    *,
    scale: Tensor | None = None,
    transposed: bool = False,
    algorithm: str | None = None,
    instructions: str | None = None,
) -> PackedWeight:
    """Pack ``scale * weight``.

    Args:
        weight: ``[K, C, R, S]``.
        geometry: Of the convolution.
        scale: ``[K]`` or None.
        transposed: The weight of ``Geometry.transposed``, whose geometry is then given.
        algorithm: None: the fastest one where all inputs are read.
        instructions: None: the best ones.
    """
    outputs, inputs, *kernel = weight.shape
    if algorithm is None:
        algorithm = algorithm_for(weight, geometry, outputs if transposed else inputs)
    swapped = transposed and algorithm != "depthwise"
    size = (inputs, outputs, *kernel) if swapped else (outputs, inputs, *kernel)
    instructions = best_instructions() if instructions is None else instructions
    if instructions is None:
        raise ValueError("instructions: got a processor without AVX2 and FMA, needs what the kernels are written for")
    data = weight.new_empty(_C.masked_conv_packed_size(algorithm, instructions, size))
    _C.masked_conv_pack(algorithm, instructions, weight, scale, transposed, data, torch.get_num_threads())
    return PackedWeight(data, size, geometry, algorithm, instructions)


def convolve(
    x: Tensor,
    packed: PackedWeight,
    rows: int,
    *,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    saves: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``mask * act(conv(x) + shift + residual)`` and, if ``saves``, the same without the mask.

    Args:
        x: ``[N, c, H, W]`` with the first ``c`` channels of those that the weight has. Read in place also as a view of
            some channels of a wider tensor; as a view of some pixels it is copied.
        packed: The weight ``[K, C, R, S]``.
        rows: How many outputs are computed; the results are ``[N, K, P, Q]`` with zeros behind these.
        shift: At least ``[rows]``, like the mask.
        mask: Of the outputs.
        residual: Added before the activation.
        activation: One of ``BOUNDS``.
        saves: Whether the second result is wanted.
    """
    lowest, highest = BOUNDS[activation]
    results = [empty_rows(packed.geometry.output_size(x.shape, packed.size)) for _ in range(1 + saves)]
    views = results
    if rows < packed.size[0]:
        for result in results:
            result[:, rows:] = 0
        views = [result[:, :rows] for result in results]
    if rows > 0:
        x = in_rows(x)
        shift, mask = (None if vector is None else vector[:rows].contiguous() for vector in (shift, mask))
        moves = (packed.geometry.stride, packed.geometry.padding, packed.geometry.dilation)
        kernel = (packed.algorithm, packed.instructions)
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)[:, :rows]
        y, saved = views[0], views[1] if saves else None
        _C.masked_conv(
            *kernel, x, packed.data, packed.size, *moves, shift, mask, residual, lowest, highest,
            y, saved, torch.get_num_threads(),
        )  # fmt: skip
    return results[0], results[1] if saves else None


def convolve_prefix(x: Tensor, packed: PackedWeight, rows: int, bias: Tensor | None = None) -> Tensor:
    """``conv(x)`` with the first ``rows`` outputs of a weight, and as many of its inputs as x has.

    Args:
        x: ``[N, c, H, W]``, as in ``convolve``.
        packed: The weight ``[K, C, R, S]``.
        rows: From 1 to K.
        bias: ``[rows]``.

    Returns:
        ``[N, rows, P, Q]``, channels_last.
    """
    y = empty_rows(packed.geometry.output_size(x.shape, (rows, *packed.size[1:])))
    moves = (packed.geometry.stride, packed.geometry.padding, packed.geometry.dilation)
    lowest, highest = BOUNDS["identity"]
    _C.masked_conv(
        packed.algorithm, packed.instructions, in_rows(x), packed.data, packed.size, *moves,
        None if bias is None else bias.contiguous(), None, None, lowest, highest, y, None, torch.get_num_threads(),
    )  # fmt: skip
    return y


def in_rows(x: Tensor) -> Tensor:
    """X as the kernel reads it: copied if it lies otherwise."""
    return x if has_rows(x) else x.clone(memory_format=torch.channels_last)


def convolve_back(
    dz: Tensor,
    packed: PackedWeight,
    *,
    residual: Tensor | None = None,
    previous: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "identity",
    want_dmask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what a convolution read, or of what stands before it: ``d = conv(dz) + residual``.

    Args:
        dz: ``[N, k, P, Q]``, the gradient of its first outputs.
        packed: The transposed weight.
        residual: ``[N, C, H, W]``, the gradient that other readers have.
        previous: ``[N, C, H, W]``, what was read, ``act(…)`` before the mask. With it the first result is ``d * mask *
            act'``, and the second, if wanted, the mask's gradient: the sum of ``d * previous`` over batch and pixels.
        mask: ``[C]``, that of what was read.
        activation: One of ``BOUNDS``.
        want_dmask: Whether the second result is wanted.
    """
    channels, (lowest, highest) = packed.size[0], BOUNDS[activation]
    dx = empty_rows(packed.geometry.output_size(dz.shape, packed.size))
    dmask = dz.new_empty(channels) if want_dmask else None
    moves = (packed.geometry.stride, packed.geometry.padding, packed.geometry.dilation)
    mask = None if mask is None else mask.contiguous()
    residual, previous = (None if pixels is None else in_rows(pixels) for pixels in (residual, previous))
    _C.masked_conv(
        packed.algorithm, packed.instructions, in_rows(dz), packed.data, packed.size, *moves, None, mask, residual,
        lowest, highest, dx, None, torch.get_num_threads(), previous, dmask,
    )  # fmt: skip
    return dx, dmask
