"""Convolutions with frozen weights, as the libraries under torch compute them fastest.

On the CPU that is oneDNN with bias, residual and some activations as its post-ops; torch exposes them as
``torch.ops.mkldnn._convolution_pointwise``, which its own compiler calls. Everything else goes through
``torch.nn.functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprune.ops.layout import layout_of

# relu and relu6 are missing: oneDNN computes them as max(z, 0), by an instruction that turns NaN into 0.
_POST_OPS = {"silu": "swish", "hardswish": "hardswish"}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu_,
    "relu6": lambda z: z.clamp_(0, 6),
    "silu": lambda z: F.silu(z, inplace=True),
    "hardswish": lambda z: F.hardswish(z, inplace=True),
}


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation (vertical, horizontal) and groups of a 2-d convolution."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def numbers(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Stride, padding, dilation and groups, in the order of torch's arguments."""
        return self.stride, self.padding, self.dilation, self.groups

    def output_size(self, x_size: Sequence[int], weight_size: Sequence[int]) -> list[int]:
        """``[N, K, P, Q]`` for x ``[N, C, H, W]`` and weight ``[K, C / groups, R, S]``."""
        spans = [self.dilation[d] * (weight_size[2 + d] - 1) + 1 for d in (0, 1)]
        sides = [(x_size[2 + d] + 2 * self.padding[d] - spans[d]) // self.stride[d] + 1 for d in (0, 1)]
        return [x_size[0], weight_size[0], *sides]

    def is_pointwise(self, weight: Tensor) -> bool:
        """Return whether every output pixel reads one input pixel, in order: a matrix product over the channels."""
        same = self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        return same and weight.shape[2:] == (1, 1)

    def transposed(self, weight: Tensor) -> Geometry | None:
        """The convolution that is the gradient of this one with respect to x; None: only a transposed one is."""
        padding = tuple(self.dilation[d] * (weight.shape[2 + d] - 1) - self.padding[d] for d in (0, 1))
        if self.stride != (1, 1) or min(padding) < 0:
            return None
        return Geometry((1, 1), (padding[0], padding[1]), self.dilation, self.groups)


def transposed_weight(weight: Tensor, groups: int) -> Tensor:
    """The weight of ``Geometry.transposed``: channels exchanged within each group, kernels turned by 180 degrees."""
    outputs, inputs, *kernel = weight.shape
    grouped = weight.reshape(groups, outputs // groups, inputs, *kernel).transpose(1, 2).flip(3, 4)
    return grouped.reshape(groups * inputs, outputs // groups, *kernel)


def onednn_takes(x: Tensor) -> bool:
    """Return whether oneDNN computes on tensors like x here."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if x.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return x.dtype == torch.float32


def adds(x: Tensor, activation: str) -> bool:
    """Return whether the library adds a residual before it writes the convolution's result, and as precisely as we."""
    return onednn_takes(x) and x.dtype == torch.float32 and activation in ("identity", "relu")


def weight_outweighs(weight: Tensor, rows: int) -> bool:
    """Return whether copying the weight into oneDNN's layout costs more than that layout gains over a plain one.

    Measured on AVX-512 with 7 x 7 to 56 x 56 pixels and batches of 8: the two meet at about 512 weights a row.
    """
    return weight.numel() > 512 * rows


def convolve(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Geometry,
    activation: str = "identity",
    residual: Tensor | None = None,
) -> Tensor:
    """Compute ``act(conv(x, weight) + shift + residual)``, in new memory.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[K, C / groups, R, S]``.
        shift: ``[K]``.
        geometry: Stride, padding, dilation, groups.
        activation: One of ``fastprune.ops.activations.ACTIVATIONS``.
        residual: A tensor of the result's shape, where ``adds`` holds or oneDNN does not compute.
    """
    if not onednn_takes(x) or x.numel() == 0 or weight.numel() == 0:
        z = F.conv2d(x, weight, shift, *geometry.numbers)
        return IN_PLACE[activation](z if residual is None else z.add_(residual))
    layout, left = layout_of(x), activation
    if residual is None:
        left = "identity" if activation in _POST_OPS else activation
        z = _convolve_by_onednn(x, weight, shift, geometry, _POST_OPS.get(activation, "none"))
    else:
        z = _convolve_and_add_by_onednn(x, weight, shift, geometry, residual.contiguous(memory_format=layout))
    return IN_PLACE[left](z).contiguous(memory_format=layout)


def _convolve_by_onednn(
    x: Tensor, weight: Tensor, shift: Tensor | None, geometry: Geometry, post_op: str = "none"
) -> Tensor:
    """Compute the convolution, as a matrix product where that is faster."""
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    multiplies = layout_of(x) == torch.channels_last and geometry.is_pointwise(weight)
    if multiplies and weight_outweighs(weight, rows):
        matrix = torch.ops.mkldnn._linear_pointwise(
            x.permute(0, 2, 3, 1).reshape(rows, x.shape[1]), weight.reshape(weight.shape[:2]), shift, post_op, [], ""
        )
        return matrix.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
    stride, padding, dilation, groups = geometry.numbers
    z: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, _in_layout_of(x, weight), shift, padding, stride, dilation, groups, post_op, [], ""
    )
    return z


def _convolve_and_add_by_onednn(
    x: Tensor, weight: Tensor, shift: Tensor | None, geometry: Geometry, residual: Tensor
) -> Tensor:
    # With one channel or one pixel both layouts have the same strides, and torch 2.11 takes the other one and fails.
    if residual.shape[1] == 1 or residual.shape[2] * residual.shape[3] == 1:
        return _convolve_by_onednn(x, weight, shift, geometry).add_(residual)
    stride, padding, dilation, groups = geometry.numbers
    z: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, _in_layout_of(x, weight), shift, padding, stride, dilation, groups, "add", 1.0, None, [], None
    )
    return z


def _in_layout_of(x: Tensor, weight: Tensor) -> Tensor:
    # oneDNN's result is channels_last as soon as one of its inputs is.
    return weight.contiguous() if layout_of(x) == torch.contiguous_format else weight


def input_gradient(dz: Tensor, x_size: torch.Size | list[int], weight: Tensor, geometry: Geometry) -> Tensor:
    """Compute the gradient of ``conv(x, weight)`` with respect to x.

    Args:
        dz: ``[N, K, P, Q]``.
        x_size: ``[N, C, H, W]``.
        weight: ``[K, C / groups, R, S]``.
        geometry: Stride, padding, dilation, groups.
    """
    transposed = geometry.transposed(weight)
    if transposed is not None and onednn_takes(dz) and dz.numel() > 0 and weight.numel() > 0:
        rows = dz.shape[0] * dz.shape[2] * dz.shape[3]
        if geometry.is_pointwise(weight) or not weight_outweighs(weight, rows):
            return convolve(dz, transposed_weight(weight, geometry.groups), None, transposed)
    # Only the shape and the layout of x matter, and its memory is never touched; on CUDA it is taken until the call
    # returns. A tensor of strides 0 takes none, but makes torch bring dz and dx into another layout and back.
    layout = layout_of(dz)
    x = torch.empty(x_size, dtype=dz.dtype, device=dz.device, memory_format=layout)
    return _library_gradients(dz, x, weight.contiguous(memory_format=layout), geometry, (True, False, False))[0]


def weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Compute the gradient of ``conv(x, weight)`` with respect to the weight."""
    return _library_gradients(dz, x, weight, geometry, (False, True, False))[1]


def _library_gradients(
    dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, the weight and a bias."""
    stride, padding, dilation, groups = geometry.numbers
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        dz, x, weight, None, stride, padding, dilation, False, (0, 0), groups, wanted
    )
    return gradients
