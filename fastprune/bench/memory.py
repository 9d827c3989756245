"""The memory that a step takes at its peak, and the memory that it keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "the third step"


@dataclass(frozen=True)
class Memory:
    """Bytes of a step that is repeated.

    Args:
        kept: memory that the first two steps leave allocated: folded weights, gradients, an optimiser's moments.
        peak: greatest memory that a later step allocates at once on top of that: activations, tensors that autograd
            saves, gradients, and scratch memory of kernels, as far as torch allocates it.
    """

    kept: int
    peak: int


def memory_of(step: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> Memory:
    """Call a new step three times and watch torch's allocator.

    CUDA's allocator keeps statistics; on the CPU the profiler records every event of the allocator. Neither sees memory
    that a library (oneDNN, say) takes from the system directly.
    """

    def call() -> None:  # drops the result
        step(*arguments)

    return measure_on_cuda(call) if device.type == "cuda" else measure_on_host(call)


def measure_on_host(step: Callable[[], None]) -> Memory:
    """Measure with the profiler, from the first step on: it misses when memory from before its start is freed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler logs every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        step()
        with record_function(MARK):
            step()
    records: Any = profiler.profiler
    events = sorted(records.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == MARK)
    allocations = [event for event in events if event.name() == "[memory]"]
    kept = sum(event.nbytes() for event in allocations if event.start_ns() < begin)
    later = accumulate(event.nbytes() for event in allocations if event.start_ns() >= begin)
    return Memory(kept, max(later))


def measure_on_cuda(step: Callable[[], None]) -> Memory:
    """Measure with the allocator's statistics."""
    before = torch.cuda.memory_allocated()
    step()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    kept = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return Memory(kept - before, torch.cuda.max_memory_allocated() - kept)
