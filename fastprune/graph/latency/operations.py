"""The operators of a network as calls that can be made again, alone and with fewer channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastprune.graph.export.regions import Autocast
from fastprune.graph.latency.axes import Axis

Table = list[list[float]]
"""Milliseconds by width, [first axis' knots][second axis' knots]; a missing axis counts as one knot."""


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator reads.

    Args:
        shape: its shape in the full network.
        strides: its strides in the full network.
        dtype: its dtype.
        scaled: (dimension, number of the operation's axis) for each dimension that shrinks.
        source: name of the node that makes it; None for a parameter, a buffer or an input.
        value: its values if it holds no real numbers (indices, say), else None.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    scaled: tuple[tuple[int, int], ...] = ()
    source: str | None = None
    value: Tensor | None = None

    def at(self, axes: Sequence[Axis], widths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return shape and strides if the axes have ``widths``: the same order of dimensions in memory, no gaps."""
        shape = list(self.shape)
        for dim, axis in self.scaled:
            shape[dim] = max(1, round(shape[dim] * widths[axis] / axes[axis].size))
        strides = [0] * len(shape)
        elements = 1
        for dim in sorted(range(len(shape)), key=lambda d: (self.strides[d], self.shape[d], -d)):
            if self.strides[dim] or self.shape[dim] == 1:  # else expanded
                strides[dim] = elements
                elements *= shape[dim]
        return tuple(shape), tuple(strides)


@dataclass(frozen=True)
class GroupCount:
    """The number of groups of a depthwise convolution, which is its number of channels."""

    size: int

    def at(self, axes: Sequence[Axis], widths: Sequence[int]) -> int:
        """Return the number of groups if the first axis has the first of ``widths``."""
        return self.size * widths[0] // axes[0].size


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Args:
        node: name of its node in the exported graph.
        module: the module whose code calls it; for a layer, the module that owns the weight.
        operator: its name.
        target: the function that is called.
        arguments: (args, kwargs), with an ``Operand`` in place of each tensor.
        axes: the widths that its time depends on: in and out of a layer, one or none of another operator.
        layer: whether it is a convolution or linear layer.
        in_place: whether it writes into its first operand.
        modules: names of the modules whose code it is part of, the outermost first.
        modes: modes of the ``torch.autocast`` regions around it, the outermost first.
    """

    node: str
    module: str
    operator: str
    target: Any
    arguments: tuple[Any, Any]
    axes: tuple[Axis, ...]
    layer: bool
    in_place: bool
    modules: tuple[str, ...]
    modes: tuple[Autocast, ...] = ()

    @property
    def operands(self) -> list[Operand]:
        """The tensors that it reads."""
        return [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Operand)]


@dataclass(frozen=True)
class Measured:
    """An operation and its times on a grid of widths."""

    operation: Operation
    table: Table

    @property
    def full_ms(self) -> float:
        """Milliseconds in the full network."""
        first, second = ([0, 0] + [axis.knots.index(axis.size) for axis in self.operation.axes])[-2:]
        return self.table[first][second]


def scale_operand(operand: Operand, dims: Sequence[tuple[int, int]], axes: Sequence[Axis]) -> Operand:
    """Let the dimensions ``dims`` of an operand, (dimension, axis), shrink with those axes that can."""
    shrinking = tuple((dim, axis) for dim, axis in dims if axes[axis].counts)
    return replace(operand, scaled=shrinking)
