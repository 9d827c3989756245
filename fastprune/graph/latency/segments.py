"""A layer and the operators behind it, up to the next layer: they are timed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fastprune.graph.latency.operations import GroupCount, Operand, Operation


@dataclass(frozen=True)
class Segment:
    """A layer and the operators behind it, up to the next layer."""

    operations: tuple[Operation, ...]

    @property
    def key(self) -> list[Any]:
        """All that its times depend on, besides the machine: operators, shapes, arguments. JSON values."""
        place = {operation.node: number for number, operation in enumerate(self.operations)}

        def describe(leaf: Any) -> Any:
            if isinstance(leaf, Operand):
                source = place.get(leaf.source or "", -1)
                return [str(leaf.dtype), list(leaf.shape), list(leaf.strides), list(map(list, leaf.scaled)), source]
            if isinstance(leaf, GraphModule):
                return leaf.code
            return ["groups", leaf.size] if isinstance(leaf, GroupCount) else str(leaf)

        return [
            [
                str(operation.target),
                [describe(leaf) for leaf in pytree.tree_leaves(operation.arguments)],
                [list(axis.knots) for axis in operation.axes],
                [[mode.device, str(mode.dtype), mode.enabled] for mode in operation.modes],
            ]
            for operation in self.operations
        ]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shape of each operation's table."""
        counts = [[1, 1, *(len(axis.knots) for axis in operation.axes)] for operation in self.operations]
        return [(found[-2], found[-1]) for found in counts]

    @property
    def layer(self) -> Operation | None:
        """The layer that it begins with; None at the beginning of a network."""
        return self.operations[0] if self.operations[0].layer else None

    def points(self) -> list[tuple[tuple[int, ...], ...]]:
        """Return points of the grid, which together meet all knots of all operations' axes.

        A point is the numbers of the knots for each operation's axes. All operators behind the layer shrink with its
        output channels.
        """
        inner = [len(o.axes[-1].knots) for o in self.operations if o.axes]
        outer = len(self.layer.axes[0].knots) if self.layer is not None and len(self.layer.axes) == 2 else 1
        rows = max(inner, default=1)

        def knot(operation: Operation, i: int, j: int) -> tuple[int, ...]:
            if not operation.axes:
                return ()
            last = len(operation.axes[-1].knots) - 1
            along = round(j * last / max(rows - 1, 1))
            return (i, along) if len(operation.axes) == 2 else (along,)

        return [tuple(knot(o, i, j) for o in self.operations) for i in range(outer) for j in range(rows)]


def split_segments(operations: Sequence[Operation]) -> list[Segment]:
    """Split the operations of a network before every layer."""
    found: list[list[Operation]] = []
    for operation in operations:
        if operation.layer or not found:
            found.append([])
        found[-1].append(operation)
    return [Segment(tuple(part)) for part in found]
