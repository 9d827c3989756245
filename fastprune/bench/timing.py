"""Timing of variants in turns, so that a busy or drifting machine slows all of them alike."""

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
MOST_SETS = 64  # greatest number of inputs in rotation


@dataclass(frozen=True)
class Timing:
    """Times of one variant.

    Args:
        seconds: time of each round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and upper quartile of the rounds."""
        return quartiles(self.seconds)

    def ratio_quartiles(self, other: Timing) -> tuple[float, float]:
        """Return the quartiles of the ratio to another variant, round by round, so that common drift cancels."""
        return quartiles([mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


class Clock:
    """A clock for single calls.

    Args:
        device: the device that calls run on.
        events: whether to take the device's own time between two events on CUDA, including gaps in which it waits for
            the host. Otherwise wall time until the result is there.
        processor: whether to take the processor's time instead of wall time, where ``events`` do not apply.
        flush: bytes to write before each call, outside of its time, so that nothing stays in a cache.
    """

    def __init__(self, device: torch.device, *, events: bool = False, processor: bool = False, flush: int = 0) -> None:
        self.device = device
        self.events = events and device.type == "cuda"
        self.now = time.process_time if processor else time.perf_counter
        self.scratch = torch.empty(flush, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        """Return the seconds of ``function(*arguments)``."""
        if self.scratch.numel():
            self.scratch.add_(1)  # on CUDA also gives the host time to launch before the device is ready
        return self.device_seconds(function, arguments) if self.events else self.host_seconds(function, arguments)

    def host_seconds(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        """Return the wall time or processor time of a call."""
        wait(self.device)
        begin = self.now()
        result = function(*arguments)
        wait(self.device)
        elapsed = self.now() - begin
        del result  # free it after the clock has stopped
        return elapsed

    def device_seconds(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        """Return the device's own time of a call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(*arguments)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(
    variants: Mapping[str, Callable[..., Any]],
    inputs: Callable[[], tuple[Any, ...]],
    clock: Callable[[Callable[..., Any], tuple[Any, ...]], float],
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Timing]:
    """Time every variant once per round; each round begins with another one.

    Args:
        variants: functions to time, by name.
        inputs: returns the arguments of one call.
        clock: times one call.
        rounds: greatest number of rounds, warm-up not counted.
        seconds: time after which no further round begins, once there are five.
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


def rotate_inputs(draw: Callable[[], tuple[Any, ...]], cache_bytes: int) -> Callable[[], tuple[Any, ...]]:
    """Return a function that cycles through enough inputs to evict each from the cache before its next turn."""
    sets = [draw()]
    size = max(1, sum(nbytes(value) for value in sets[0]))
    sets.extend(draw() for _ in range(min(MOST_SETS - 1, 2 * cache_bytes // size)))
    return itertools.cycle(sets).__next__


def nbytes(value: Any) -> int:
    """Return the bytes of a tensor, or of all tensors in a tuple or list."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(nbytes(element) for element in value)
    return 0
