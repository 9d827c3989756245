"""Variants timed in turns, so that a busy or drifting machine is as unfair to one as to the other."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_ROUNDS = 5
WARM_UP = 3
MOST_SETS = 64  # of inputs that take turns


@dataclass(frozen=True)
class Timing:
    """What the rounds took.

    Args:
        seconds: of each round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The usual round."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which half of the rounds lie."""
        return quartiles(self.seconds)

    def spread_over(self, other: Timing) -> tuple[float, float]:
        """Quartiles of the quotient of two variants' times, round by round, so that common drift cancels."""
        return quartiles([mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


class Clock:
    """Times one call.

    Args:
        device: where it runs.
        events: on CUDA, the device's own time between two events, gaps included in which it waited for the host.
            Otherwise wall time until the result is there.
        processor: the processor's time instead of the wall's, where ``events`` are not asked for.
        flush: bytes to write before each call, unseen by the clock, so that nothing is left in a cache.
    """

    def __init__(self, device: torch.device, *, events: bool = False, processor: bool = False, flush: int = 0) -> None:
        self.device = device
        self.events = events and device.type == "cuda"
        self.now = time.process_time if processor else time.perf_counter
        self.flushed = torch.empty(flush, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        """Seconds of ``function(*arguments)``."""
        if self.flushed.numel():
            self.flushed.add_(1)  # on CUDA also gives the host time to launch before the device is ready
        return self.on_device(function, arguments) if self.events else self.on_wall(function, arguments)

    def on_wall(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        """Wall time."""
        wait(self.device)
        begin = self.now()
        result = function(*arguments)
        wait(self.device)
        elapsed = self.now() - begin
        del result  # freed after the clock has stopped
        return elapsed

    def on_device(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        """The device's own time."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(*arguments)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Mapping[str, Callable[..., Any]],
    inputs: Callable[[], tuple[Any, ...]],
    clock: Callable[[Callable[..., Any], tuple[Any, ...]], float],
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Timing]:
    """Time every variant once a round, each round beginning with another one.

    Args:
        variants: what to time.
        inputs: gives the arguments of one call.
        clock: times one call.
        rounds: how many at most, warm-up not counted.
        seconds: after these no further round begins, once there are five.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(-WARM_UP, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed = clock(variants[name], inputs())
            if number >= 0:
                times[name].append(elapsed)
        if number + 1 >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
    return {name: Timing(tuple(values)) for name, values in times.items()}


def rotating(draw: Callable[[], tuple[Any, ...]], cache_bytes: int) -> Callable[[], tuple[Any, ...]]:
    """Inputs in turn, so many that none is still in the cache when its turn comes again."""
    sets = [draw()]
    size = max(1, sum(nbytes(value) for value in sets[0]))
    sets.extend(draw() for _ in range(min(MOST_SETS - 1, 2 * cache_bytes // size)))
    return itertools.cycle(sets).__next__


def nbytes(value: Any) -> int:
    """Memory of a tensor, or of those in a tuple or list."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(nbytes(element) for element in value)
    return 0
