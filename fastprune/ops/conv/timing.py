"""Times of kernels, measured in turns and with cold caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
Timer = Callable[[Sequence[Call], torch.device], list[float]]
"""Measures calls on a device, in milliseconds."""

ROUNDS = 10


def time_calls(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Measure the median milliseconds of each call, with cold caches on CUDA.

    The calls take turns, so that a clock that changes in between changes all of them.
    """
    for call in calls:
        call()
    synchronize(device)
    measure = _time_on_cuda if device.type == "cuda" else _time_on_cpu
    samples = measure(calls, device)
    return [statistics.median(sample) for sample in zip(*samples, strict=True)]


def _time_on_cuda(calls: Sequence[Call], device: torch.device) -> list[list[float]]:
    # Writing four times the L2 cache empties it. It also keeps the device busy while the host enqueues the next call,
    # so that the time between two events contains no waiting for the host; twice, since the host needs a tenth of a
    # millisecond for a fallback of several calls.
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * cache_bytes, 1 << 28), dtype=torch.int8, device=device)
    samples = []
    with torch.cuda.device(device):
        for _ in range(ROUNDS):
            events = []
            for call in calls:
                flush.zero_()
                flush.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize(device)
            samples.append([start.elapsed_time(end) for start, end in events])
    return samples


def _time_on_cpu(calls: Sequence[Call], _: torch.device) -> list[list[float]]:
    samples = []
    for _round in range(ROUNDS):
        row = []
        for call in calls:
            start = time.perf_counter()
            call()
            row.append((time.perf_counter() - start) * 1e3)
        samples.append(row)
    return samples


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that its errors are raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
