"""How much memory a step takes at its peak, and how much it keeps."""

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
    """Bytes of a step that is done again and again.

    Args:
        kept: what the first two steps have left allocated: folded weights, gradients, an optimiser's moments.
        peak: the most that another step has allocated at once on top of what there was before it: activations, what
            autograd keeps of them, gradients, and scratch memory of kernels, as far as torch allocates it.
    """

    kept: int
    peak: int


def memory_of(step: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> Memory:
    """Call a step that has not been called before three times, and watch torch's allocator.

    On CUDA its own statistics. On the CPU every event of the allocator that the profiler records; memory that a
    library (oneDNN, say) takes from the system behind torch's back is seen by neither.
    """

    def once() -> None:  # its result is not kept
        step(*arguments)

    return on_cuda(once) if device.type == "cuda" else on_host(once)


def on_host(step: Callable[[], None]) -> Memory:
    """The profiler does not tell when memory from before its time is freed, so it watches from the first step on."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or else it tells of each beginning and end
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


def on_cuda(step: Callable[[], None]) -> Memory:
    """The allocator keeps account."""
    before = torch.cuda.memory_allocated()
    step()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    kept = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return Memory(kept - before, torch.cuda.max_memory_allocated() - kept)
