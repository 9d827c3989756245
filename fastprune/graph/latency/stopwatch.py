"""Times of operators on a grid of widths, measured as the operators follow each other in the network.

An operator that is timed alone, again and again, finds its weights and its input in the cache. In the network the
weights of all other layers have passed meanwhile, and its input comes from the operator before it. So operators are
timed in *segments*: a layer and the operators behind it up to the next layer, each on the results of those before it.
Weights and inputs from elsewhere are views that wander through a pool as large as the memory that the network touches
in one pass.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fastprune.graph.latency.calls import Call, Pool, Timer, timer_of
from fastprune.graph.latency.operations import GroupCount, Operand, Operation, Table
from fastprune.graph.latency.segments import Segment

LARGEST_POOL = 1 << 27  # bytes; beyond the caches of nearly every machine
REPEATS = 5
HEAP_BYTES = 31 << 20  # just below the largest block that glibc takes from its heap, once one of that size was freed


class Stopwatch:
    """Times segments.

    Args:
        device: the device that runs the operators.
        footprint: number of bytes that the network touches in a pass.
        timer: the timer of calls; None = the device's usual one.
    """

    def __init__(self, device: torch.device, footprint: int, timer: Timer | None = None) -> None:
        self.pool = Pool(device, pool_bytes(footprint))
        self.timer = timer or timer_of(device)
        if device.type == "cpu":
            # A segment frees all of its results at once. glibc then returns memory to the system, and the next run pays
            # for new pages, which a running network does not: 1.6 ms instead of 0.3 for a batch norm of 5 MB.
            torch.empty(HEAP_BYTES, dtype=torch.uint8).fill_(0)

    def tables(self, segment: Segment) -> list[Table]:
        """Return the median milliseconds of each operation at every point of its grid."""
        with torch.inference_mode():
            cut = Segment(tuple(self.fix_rigid(operation) for operation in segment.operations))
            points = cut.points()
            times: list[dict[tuple[int, ...], list[float]]] = [{} for _ in cut.operations]
            for repeat in range(-1, REPEATS):  # all points in turn, so that a busy second spoils none of them
                for point in points:
                    seconds = self.timer(self.calls(cut, point))
                    for found, knots, elapsed in zip(times, point, seconds, strict=True):
                        if repeat >= 0:
                            found.setdefault(knots, []).append(elapsed)
        return [
            make_table(original, {k: 1000 * statistics.median(v) for k, v in found.items()})
            for original, found in zip(segment.operations, times, strict=True)
        ]

    def fix_rigid(self, operation: Operation) -> Operation:
        """Return the operation, without its axes if it cannot run on fewer channels (it holds their number, say).

        PyTorch's layers always can. A layer of a user's own is tried, as its rule does not say.
        """
        if (operation.layer and namespace(operation) == "aten") or not operation.axes:
            return operation
        try:
            for knots in itertools.product(*(range(len(axis.knots)) for axis in operation.axes)):
                self.calls(Segment((operation,)), (knots,))[0].run([], int, int)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            return fix_widths(operation)
        return operation

    def calls(self, segment: Segment, point: Sequence[tuple[int, ...]]) -> list[Call]:
        """Return the calls of a segment at a point of the grid."""
        place = {operation.node: number for number, operation in enumerate(segment.operations)}
        calls = []
        for number, (operation, knots) in enumerate(zip(segment.operations, point, strict=True)):
            widths = [axis.knots[knot] for axis, knot in zip(operation.axes, knots, strict=True)]
            leaves, spec = pytree.tree_flatten(operation.arguments)
            sources = [place.get(x.source or "", number) if isinstance(x, Operand) else number for x in leaves]
            fed = tuple((i, source) for i, source in enumerate(sources) if source < number)
            calls.append(Call(operation, [self.leaf(x, operation, widths) for x in leaves], spec, fed))
        return calls

    def leaf(self, leaf: Any, operation: Operation, widths: Sequence[int]) -> Any:
        """Return an argument at these widths."""
        if isinstance(leaf, GroupCount):
            return leaf.at(operation.axes, widths)
        if not isinstance(leaf, Operand):
            return leaf
        if leaf.value is not None:
            return leaf.value
        return self.pool.view(*leaf.at(operation.axes, widths), leaf.dtype)


def pool_bytes(footprint: int) -> int:
    """Return the size of the pool for a network, a power of 2 so that networks of similar size share measurements."""
    return min(LARGEST_POOL, 1 << max(0, math.ceil(math.log2(max(footprint, 1)))))


def namespace(operation: Operation) -> str:
    """Return the namespace of an operator, "aten" for PyTorch's."""
    return str(getattr(operation.target, "namespace", "aten"))


def fix_widths(operation: Operation) -> Operation:
    """Return the operation with all its channels and no axes."""

    def fix(leaf: Any) -> Any:
        return replace(leaf, scaled=()) if isinstance(leaf, Operand) else leaf

    return replace(operation, axes=(), arguments=pytree.tree_map(fix, operation.arguments))


def make_table(operation: Operation, times: dict[tuple[int, ...], float]) -> Table:
    """Return times by knots as rows; in proportion to widths if it ran with all channels only."""
    knots = [axis.knots for axis in operation.axes]
    if () in times and knots:
        first, second = [(1.0,), *([width / axis.size for width in axis.knots] for axis in operation.axes)][-2:]
        return [[times[()] * a * b for b in second] for a in first]
    if len(knots) == 2:
        return [[times[i, j] for j in range(len(knots[1]))] for i in range(len(knots[0]))]
    return [[times[j,] for j in range(len(knots[0]))]] if knots else [[times[()]]]
