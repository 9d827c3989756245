"""One call of an operator that is to be timed, its timers, and the memory that its operands lie in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastprune.graph.export.regions import enter_modes
from fastprune.graph.latency.operations import Operation


@dataclass(frozen=True)
class Call:
    """One call that is to be timed.

    Args:
        operation: the operation.
        leaves: its arguments, flattened.
        spec: the structure of its arguments.
        fed: (place, earlier call) for arguments that are results of earlier calls of the same segment.
    """

    operation: Operation
    leaves: list[Any]
    spec: pytree.TreeSpec
    fed: tuple[tuple[int, int], ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the tensors that it reads."""
        return [tuple(leaf.shape) for leaf in self.leaves if isinstance(leaf, Tensor)]

    def arguments(self, results: Sequence[Any]) -> tuple[Any, Any]:
        """Return the arguments of the call, given the results of earlier ones (used if their shape is as expected)."""
        leaves = list(self.leaves)
        for place, earlier in self.fed:
            made = results[earlier]
            if isinstance(made, Tensor) and made.shape == leaves[place].shape:
                leaves[place] = made
        if self.operation.in_place and leaves[0] is self.leaves[0]:
            leaves[0] = leaves[0].clone()  # else values in the pool would grow towards infinity
        arguments: tuple[Any, Any] = pytree.tree_unflatten(leaves, self.spec)
        return arguments

    def run(self, results: Sequence[Any], begin: Callable[[], Any], end: Callable[[], Any]) -> Any:
        """Make the call in the mode of its region, between ``begin`` and ``end``, which run in this mode, too."""
        args, kwargs = self.arguments(results)
        with enter_modes(self.operation.modes):
            begin()
            result = self.operation.target(*args, **kwargs)
            end()
        return result


Timer = Callable[[Sequence[Call]], list[float]]
"""Makes the calls of a segment in turn; returns the seconds of each."""


def time_on_host(calls: Sequence[Call], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Return the seconds of each call on the CPU."""
    results: list[Any] = []
    times: list[float] = []

    def read() -> None:
        times.append(clock())

    for call in calls:
        results.append(call.run(results, read, read))
    return [end - begin for begin, end in zip(times[::2], times[1::2], strict=True)]


def time_on_cuda(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Return the device's own seconds of each call; the device is kept busy until the host has enqueued all of them."""
    results: list[Any] = []
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    busy = torch.empty(1 << 28, dtype=torch.int8, device=device)
    for _ in range(1 + len(calls)):
        busy.zero_()
    for call, (begin, end) in zip(calls, events, strict=True):
        results.append(call.run(results, begin.record, end.record))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def timer_of(device: torch.device) -> Timer:
    """Return the timer for calls on a device."""
    return partial(time_on_cuda, device=device) if device.type == "cuda" else time_on_host


@dataclass
class Pool:
    """Memory that operands are views of; consecutive views lie behind each other, and start over at its end.

    Its numbers are between 1/2 and 3/2: a variance must be positive, and denormal numbers are slow.
    """

    device: torch.device
    bytes: int
    _memory: dict[torch.dtype, Tensor] = field(default_factory=dict)
    _place: int = 0

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the next view."""
        elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        itemsize = dtype.itemsize
        length = max(self.bytes // itemsize, elements)
        memory = self._memory.get(dtype)
        if memory is None or memory.numel() < length:
            memory = self._memory[dtype] = torch.linspace(0.5, 1.5, length, device=self.device).to(dtype)
        begin = -(-self._place // 64) * (64 // itemsize)  # at the beginning of a cache line, like any tensor
        if begin + elements > memory.numel():
            begin = 0
        self._place = (begin + elements) * itemsize
        return memory.as_strided(shape, strides, begin)
