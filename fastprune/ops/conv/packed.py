"""Our own convolution on the CPU: float32, channels_last, weights packed for it.

It beats the library where it saves work: 3x3 kernels by Winograd's F(2x2, 3x3), open channels as prefixes that it reads
and writes in place, the mask and both results in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune.ops.activations import BOUNDS
from fastprune.ops.conv.library import Geometry
from fastprune.ops.layout import empty_rows, has_rows, layout_of
from fastprune.ops.library import _C

WINOGRAD_CHANNELS = 12
"""With fewer inputs, transforming costs more than multiplying saves. Measured for 16 and 64 outputs: with 4 inputs 0.65
and 0.8 times as fast as the direct algorithm, with 8 0.8 and 0.9, with 12 0.9 and 1.05, with 16 1.0 and 1.2 on AVX-512;
on AVX2 the same for 16 outputs, and for 64 faster from 4 on."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[K, C, R, S]`` in the order in which the kernel reads it.

    Args:
        data: The packed numbers.
        size: ``(K, C, R, S)``.
        geometry: Stride, padding, dilation and groups of the convolution.
        algorithm: ``"direct"``, ``"winograd"`` or ``"depthwise"``.
        instructions: The instruction set that it is packed for.
    """

    data: Tensor
    size: tuple[int, ...]
    geometry: Geometry
    algorithm: str
    instructions: str


def best_instructions() -> str | None:
    """Return the best instruction set of this processor that the kernels are written for; None: there is none."""
    return next(iter(_C.masked_conv_instructions()), None)


def computes(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether our kernel computes this convolution."""
    return takes(x, weight, geometry) and layout_of(x) == torch.channels_last


def takes(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether our kernel would compute this convolution if x were channels_last."""
    return (
        best_instructions() is not None
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and (geometry.groups == 1 or is_depthwise(weight, geometry))
        and all(geometry.padding[d] <= geometry.dilation[d] * (weight.shape[2 + d] - 1) for d in (0, 1))
    )


def is_depthwise(weight: Tensor, geometry: Geometry) -> bool:
    """Return whether each output reads one input, by a kernel with few enough taps for ours."""
    channels, inputs, *kernel = weight.shape
    return geometry.groups == channels and inputs == 1 and math.prod(kernel) <= _C.depthwise_taps


def algorithm_for(weight: Tensor, geometry: Geometry, channels: int) -> str:
    """Return the fastest algorithm for a convolution that reads ``channels`` inputs."""
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
        geometry: Geometry of the convolution.
        scale: ``[K]`` or None.
        transposed: Whether to pack the weight of ``Geometry.transposed``, which ``geometry`` then is.
        algorithm: One of ``PackedWeight.algorithm``; None: the fastest one if all inputs are read.
        instructions: An instruction set; None: the best one.

    Raises:
        ValueError: The kernels are not written for this processor.
    """
    outputs, inputs, *kernel = weight.shape
    if algorithm is None:
        algorithm = algorithm_for(weight, geometry, outputs if transposed else inputs)
    swapped = transposed and algorithm != "depthwise"
    size = (inputs, outputs, *kernel) if swapped else (outputs, inputs, *kernel)
    instructions = best_instructions() if instructions is None else instructions
    if instructions is None:
        raise ValueError("instructions: got a processor without AVX2 and FMA, needs one with them; use the library")
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
    """Compute ``mask * act(conv(x) + shift + residual)`` and, if ``saves``, the same without the mask.

    Args:
        x: ``[N, c, H, W]``, the first ``c`` of the weight's inputs. A view of some channels of a wider tensor is read
            in place; a view of some pixels is copied.
        packed: The weight ``[K, C, R, S]``.
        rows: How many outputs to compute; the results are ``[N, K, P, Q]`` with zeros behind these.
        shift: At least ``[rows]``.
        mask: At least ``[rows]``.
        residual: ``[N, K, P, Q]``, added before the activation.
        activation: One of ``BOUNDS``.
        saves: Whether to compute the second result.
    """
    results = [empty_rows(packed.geometry.output_size(x.shape, packed.size)) for _ in range(1 + saves)]
    views = results
    if rows < packed.size[0]:
        for result in results:
            result[:, rows:] = 0
        views = [result[:, :rows] for result in results]
    if rows > 0:
        shift, mask = (None if vector is None else vector[:rows].contiguous() for vector in (shift, mask))
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)[:, :rows]
        saved = views[1] if saves else None
        _run(x, packed, views[0], saved, shift=shift, mask=mask, residual=residual, activation=activation)
    return results[0], results[1] if saves else None


def convolve_prefix(x: Tensor, packed: PackedWeight, rows: int, bias: Tensor | None = None) -> Tensor:
    """Compute the first ``rows`` outputs of ``conv(x)``, from as many of the weight's inputs as x has.

    Args:
        x: ``[N, c, H, W]``, as in ``convolve``.
        packed: The weight ``[K, C, R, S]``.
        rows: From 1 to K.
        bias: ``[rows]``.

    Returns:
        ``[N, rows, P, Q]``, channels_last.
    """
    y = empty_rows(packed.geometry.output_size(x.shape, (rows, *packed.size[1:])))
    _run(x, packed, y, shift=None if bias is None else bias.contiguous())
    return y


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
    """Compute the gradient of what a convolution read, ``d = conv(dz) + residual``, or that before its activation.

    Args:
        dz: ``[N, k, P, Q]``, the gradient of the convolution's first outputs.
        packed: The transposed weight.
        residual: ``[N, C, H, W]``, the gradient of other readers.
        previous: ``[N, C, H, W]``, what the convolution read, ``act(…)`` before the mask. With it the first result is
            ``d * mask * act'``, and the second, if wanted, the gradient of the mask: the sum of ``d * previous`` over
            batch and pixels.
        mask: ``[C]``, the mask of ``previous``.
        activation: One of ``BOUNDS``.
        want_dmask: Whether to compute the second result.
    """
    channels = packed.size[0]
    dx = empty_rows(packed.geometry.output_size(dz.shape, packed.size))
    dmask = dz.new_empty(channels) if want_dmask else None
    mask = None if mask is None else mask.contiguous()
    residual, previous = (None if pixels is None else as_rows(pixels) for pixels in (residual, previous))
    _run(dz, packed, dx, mask=mask, residual=residual, activation=activation, previous=previous, dmask=dmask)
    return dx, dmask


def _run(
    x: Tensor,
    packed: PackedWeight,
    y: Tensor,
    saved: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    previous: Tensor | None = None,
    dmask: Tensor | None = None,
) -> None:
    geometry, (lowest, highest) = packed.geometry, BOUNDS[activation]
    _C.masked_conv(
        packed.algorithm, packed.instructions, as_rows(x), packed.data, packed.size,
        geometry.stride, geometry.padding, geometry.dilation, shift, mask, residual, lowest, highest,
        y, saved, torch.get_num_threads(), previous, dmask,
    )  # fmt: skip


def as_rows(x: Tensor) -> Tensor:
    """Return x as the kernel reads it: channels_last, copied only if it is stored otherwise."""
    return x if has_rows(x) else x.clone(memory_format=torch.channels_last)
