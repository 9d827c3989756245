"""How long operators take on a grid of widths, measured as they follow each other in the network.

An operator timed alone, again and again, finds its weights and what it reads in the cache; in the network the weights
of all other layers have passed meanwhile, and its input comes from the operator before it. So operators are timed in
*segments*: a layer and what follows it up to the next one, each on the results of those before it. Weights, and what
comes from elsewhere, are views that wander through a pool as large as what the network touches in one pass.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fastprune.graph.export.regions import enter_modes
from fastprune.graph.latency.operations import Groups, Operand, Operation

LARGEST_POOL = 1 << 27  # bytes; beyond the caches of nearly every machine
REPEATS = 5
HEAP_BYTES = 31 << 20  # just below the largest block that glibc takes from its heap, once one of that size was freed
Table = list[list[float]]
"""Milliseconds by width, [first axis' knots][second axis' knots], of length 1 where there is no such axis."""


@dataclass(frozen=True)
class Call:
    """One call that is to be timed.

    Args:
        operation: what it is.
        leaves: its arguments, flattened.
        spec: how they are nested.
        fed: (place, earlier call) for arguments that are results of earlier calls of the same segment.
    """

    operation: Operation
    leaves: list[Any]
    spec: pytree.TreeSpec
    fed: tuple[tuple[int, int], ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the tensors that it reads."""
        return [tuple(leaf.shape) for leaf in self.leaves if isinstance(leaf, Tensor)]

    def arguments(self, results: Sequence[Any]) -> tuple[Any, Any]:
        """The arguments of the call, given the results of earlier ones (used where their shape is as expected)."""
        leaves = list(self.leaves)
        for place, earlier in self.fed:
            made = results[earlier]
            if isinstance(made, Tensor) and made.shape == leaves[place].shape:
                leaves[place] = made
        if self.operation.in_place and leaves[0] is self.leaves[0]:
            leaves[0] = leaves[0].clone()  # or else the pool would grow, towards infinity
        arguments: tuple[Any, Any] = pytree.tree_unflatten(leaves, self.spec)
        return arguments

    def made(self, results: Sequence[Any], begin: Callable[[], Any], end: Callable[[], Any]) -> Any:
        """The result of the call in the mode of its region; what begins and ends its time is called in it, too."""
        args, kwargs = self.arguments(results)
        with enter_modes(self.operation.modes):
            begin()
            result = self.operation.target(*args, **kwargs)
            end()
        return result


Timer = Callable[[Sequence[Call]], list[float]]
"""Makes the calls of a segment in turn; gives the seconds of each."""


def on_host(calls: Sequence[Call], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Time of each call on the CPU."""
    results: list[Any] = []
    times: list[float] = []

    def read() -> None:
        times.append(clock())

    for call in calls:
        results.append(call.made(results, read, read))
    return [end - begin for begin, end in zip(times[::2], times[1::2], strict=True)]


def on_cuda(calls: Sequence[Call], device: torch.device) -> list[float]:
    """The device's own time of each call; it is kept busy until the host has enqueued all of them."""
    results: list[Any] = []
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    busy = torch.empty(1 << 28, dtype=torch.int8, device=device)
    for _ in range(1 + len(calls)):
        busy.zero_()
    for call, (begin, end) in zip(calls, events, strict=True):
        results.append(call.made(results, begin.record, end.record))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def timer_of(device: torch.device) -> Timer:
    """What times calls on a device."""
    return partial(on_cuda, device=device) if device.type == "cuda" else on_host


@dataclass
class Pool:
    """Memory that operands are views of; consecutive ones lie behind each other, and around again at its end.

    Its numbers are between 1/2 and 3/2: a variance must be positive, and denormal numbers are slow.
    """

    device: torch.device
    bytes: int
    _memory: dict[torch.dtype, Tensor] = field(default_factory=dict)
    _place: int = 0

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next view."""
        elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        itemsize = dtype.itemsize
        length = max(self.bytes // itemsize, elements)
        memory = self._memory.get(dtype)
        if memory is None or memory.numel() < length:
            memory = self._memory[dtype] = torch.linspace(0.5, 1.5, length, device=self.device).to(dtype)
        begin = -(-self._place // 64) * (64 // itemsize)  # at the beginning of a cache line, as any tensor
        if begin + elements > memory.numel():
            begin = 0
        self._place = (begin + elements) * itemsize
        return memory.as_strided(shape, strides, begin)


@dataclass(frozen=True)
class Segment:
    """A layer and the operators behind it, up to the next layer."""

    operations: tuple[Operation, ...]

    @property
    def key(self) -> list[Any]:
        """What its times depend on, besides the machine: operators, shapes, arguments. JSON values."""
        place = {operation.node: number for number, operation in enumerate(self.operations)}

        def describe(leaf: Any) -> Any:
            if isinstance(leaf, Operand):
                source = place.get(leaf.source or "", -1)
                return [str(leaf.dtype), list(leaf.shape), list(leaf.strides), list(map(list, leaf.scaled)), source]
            if isinstance(leaf, GraphModule):
                return leaf.code
            return ["groups", leaf.size] if isinstance(leaf, Groups) else str(leaf)

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
        """The layer that it begins with; none at the beginning of a network."""
        return self.operations[0] if self.operations[0].layer else None

    def points(self) -> list[tuple[tuple[int, ...], ...]]:
        """Numbers of knots for each operation's axes, so that a run of the segment at each point meets all of them.

        All operators behind the layer shrink with what it makes.
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


def segments(operations: Sequence[Operation]) -> list[Segment]:
    """The operations of a network, cut before every layer."""
    found: list[list[Operation]] = []
    for operation in operations:
        if operation.layer or not found:
            found.append([])
        found[-1].append(operation)
    return [Segment(tuple(part)) for part in found]


class Stopwatch:
    """Times segments.

    Args:
        device: where.
        footprint: bytes that the network touches in a pass.
        timer: what times calls.
    """

    def __init__(self, device: torch.device, footprint: int, timer: Timer | None = None) -> None:
        self.pool = Pool(device, pool_bytes(footprint))
        self.timer = timer or timer_of(device)
        if device.type == "cpu":
            # A segment frees all of its results at once. glibc gives so much back to the system, and the next run pays
            # for new pages, which a network in its stride does not: 1.6 ms instead of 0.3 for a batch norm of 5 MB.
            torch.empty(HEAP_BYTES, dtype=torch.uint8).fill_(0)

    def tables(self, segment: Segment) -> list[Table]:
        """For each operation its median milliseconds at every point of its grid."""
        with torch.inference_mode():
            cut = Segment(tuple(self.runnable(operation) for operation in segment.operations))
            points = cut.points()
            times: list[dict[tuple[int, ...], list[float]]] = [{} for _ in cut.operations]
            for repeat in range(-1, REPEATS):  # all points in turn, so that a busy second spoils none of them
                for point in points:
                    seconds = self.timer(self.calls(cut, point))
                    for found, knots, elapsed in zip(times, point, seconds, strict=True):
                        if repeat >= 0:
                            found.setdefault(knots, []).append(elapsed)
        return [
            table(original, {k: 1000 * statistics.median(v) for k, v in found.items()})
            for original, found in zip(segment.operations, times, strict=True)
        ]

    def runnable(self, operation: Operation) -> Operation:
        """The operation, without its axes where it cannot be run on fewer channels (it holds their number, say).

        Of PyTorch's layers it is known that they can; of a user's own, its rule does not say so.
        """
        if (operation.layer and namespace(operation) == "aten") or not operation.axes:
            return operation
        try:
            for knots in itertools.product(*(range(len(axis.knots)) for axis in operation.axes)):
                self.calls(Segment((operation,)), (knots,))[0].made([], int, int)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            return full(operation)
        return operation

    def calls(self, segment: Segment, point: Sequence[tuple[int, ...]]) -> list[Call]:
        """The calls of a segment at a point of the grid."""
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
        """An argument at some widths."""
        if isinstance(leaf, Groups):
            return leaf.at(operation.axes, widths)
        if not isinstance(leaf, Operand):
            return leaf
        if leaf.value is not None:
            return leaf.value
        return self.pool.view(*leaf.at(operation.axes, widths), leaf.dtype)


def pool_bytes(footprint: int) -> int:
    """The size of the pool for a network, a power of 2 so that networks of similar size share measurements."""
    return min(LARGEST_POOL, 1 << max(0, math.ceil(math.log2(max(footprint, 1)))))


def namespace(operation: Operation) -> str:
    """Whose operator it is: "aten" for PyTorch's."""
    return str(getattr(operation.target, "namespace", "aten"))


def full(operation: Operation) -> Operation:
    """An operation that is run with all channels only."""

    def whole(leaf: Any) -> Any:
        return replace(leaf, scaled=()) if isinstance(leaf, Operand) else leaf

    return replace(operation, axes=(), arguments=pytree.tree_map(whole, operation.arguments))


def table(operation: Operation, times: dict[tuple[int, ...], float]) -> Table:
    """Times by knots as rows; those of an operator that ran with all channels only, in proportion to them."""
    knots = [axis.knots for axis in operation.axes]
    if () in times and knots:
        first, second = [(1.0,), *([width / axis.size for width in axis.knots] for axis in operation.axes)][-2:]
        return [[times[()] * a * b for b in second] for a in first]
    if len(knots) == 2:
        return [[times[i, j] for j in range(len(knots[1]))] for i in range(len(knots[0]))]
    return [[times[j,] for j in range(len(knots[0]))]] if knots else [[times[()]]]
