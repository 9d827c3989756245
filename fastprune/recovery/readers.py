"""Layers as least squares sees them: rows of inputs (patches), rows of outputs, and a weight between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fastprune.graph import Layer
from fastprune.graph.export.nodes import argument_of
from fastprune.networks.chains import is_stored

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
}


@dataclass(frozen=True)
class Shift:
    """The tensor that shifts the output channels of a layer.

    Args:
        tensor: name of the layer's bias, or of the running mean of the batch norm that alone reads the layer.
        sign: the effect of the tensor on the shift, 1 for a bias and -1 for a mean.
    """

    tensor: str
    sign: float


@dataclass(frozen=True)
class Reader:
    """A convolution or linear layer whose weight can be fitted.

    Args:
        node: its node in the traced graph.
        layer: the layer.
        groups: number of its groups; each maps its own inputs to its own outputs.
        shift: what shifts its outputs; None = nothing that may change, so that the fit goes through the origin.
        bias: name of its bias, if it has one.
    """

    node: Node
    layer: Layer
    groups: int
    shift: Shift | None
    bias: str | None = None

    @staticmethod
    def of(node: Node, layer: Layer, is_alone: Callable[[str], bool] = lambda name: True) -> Reader | None:
        """Return the reader of a node; None if its weight is computed, or it is neither convolution nor linear.

        Args:
            node: the node.
            layer: the layer.
            is_alone: whether one node alone reads a tensor, so that it may change.
        """
        if node.target not in CONVOLUTIONS and node.target is not aten.linear.default:
            return None
        weight = argument_of(node, "weight")
        if not is_stored(weight) or str(weight.target) != layer.weight:
            return None
        groups = int(argument_of(node, "groups")) if node.target in CONVOLUTIONS else 1
        shift, bias = find_shift(node), argument_of(node, "bias")
        if shift is not None and not is_alone(shift.tensor):
            shift = None
        return Reader(node, layer, groups, shift, str(bias.target) if is_stored(bias) else None)

    @property
    def is_convolution(self) -> bool:
        """Whether the layer is a convolution."""
        return self.node.target in CONVOLUTIONS

    def rows(self, x: Tensor, y: Tensor, weight: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Gather inputs and outputs at some places of the output.

        Args:
            x: what the layer reads.
            y: what it returns, or should return.
            weight: its weight.
            places: int64 [R], indices into the outputs without their channels, in row-major order.

        Returns:
            ``[G, R, I]`` and ``[G, R, O]``: for each group its inputs (a patch, in the weight's order) and outputs.
        """
        if self.is_convolution:
            patches = gather_patches(self.node, x, weight, y.shape[2:], places)
            outputs = y.movedim(1, -1).reshape(-1, y.shape[1])[places]
        else:
            patches, outputs = x.reshape(-1, x.shape[-1])[places], y.reshape(-1, y.shape[-1])[places]
        if patches.dtype != torch.float64:  # products of half-precision numbers would have few digits, or overflow
            patches, outputs = patches.float(), outputs.float()
        split = len(places), self.groups, -1
        return patches.reshape(split).transpose(0, 1), outputs.reshape(split).transpose(0, 1)

    def count_places(self, y: Tensor) -> int:
        """Return the number of places of an output."""
        return y.numel() // y.shape[1 if self.is_convolution else -1]


def gather_patches(node: Node, x: Tensor, weight: Tensor, out_size: torch.Size, places: Tensor) -> Tensor:
    """Return the patches that a convolution reads for some of its output positions, [R, C * prod(kernel)]."""
    kernel = weight.shape[2:]
    rank = len(kernel)
    stride, dilation = spread(argument_of(node, "stride"), rank), spread(argument_of(node, "dilation"), rank)
    padded = F.pad(x, pad_sizes(argument_of(node, "padding"), kernel, dilation)).movedim(1, -1).contiguous()
    sample, *index = torch.unravel_index(places, (x.shape[0], *out_size))
    first, offsets = sample, torch.zeros(1, dtype=torch.int64, device=x.device)  # of a patch's first pixel; from there
    for length, i, step, k, d in zip(padded.shape[1:-1], index, stride, kernel, dilation, strict=True):
        first = first * length + i * step
        offsets = (offsets.unsqueeze(1) * length + d * torch.arange(k, device=x.device)).flatten()
    pixels = padded.flatten(0, -2)[first.unsqueeze(1) + offsets]  # whole pixels, which are contiguous
    return pixels.transpose(1, 2).flatten(1)


def pad_sizes(padding: Any, kernel: torch.Size, dilation: list[int]) -> list[int]:
    """Return padding as ``F.pad`` takes it: last dimension first, before and after."""
    if padding == "valid":
        return [0, 0] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(size, size) for size in spread(padding, len(kernel))]
    return [size for pair in reversed(pairs) for size in pair]


def spread(sizes: Any, rank: int) -> list[int]:
    """Return one size per dimension; torch takes a list of one for all of them."""
    values = [sizes] if isinstance(sizes, int) else list(sizes)
    return values * rank if len(values) == 1 else values


def find_shift(node: Node) -> Shift | None:
    """Find the tensor that shifts a layer's output."""
    bias = argument_of(node, "bias")
    if is_stored(bias):
        return Shift(str(bias.target), 1.0)
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.batch_norm.default:
        mean = argument_of(users[0], "running_mean")
        if is_stored(mean):
            return Shift(str(cast("Node", mean).target), -1.0)
    return None


def count_unknowns(reader: Reader, weight: Tensor) -> int:
    """Return the number of inputs of each output, the unknowns of its fit."""
    return prod(weight.shape[1:])
