"""Times of forward passes, of several networks in turn, so that a drifting machine is fair to all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from fastprune.graph.model_state import in_eval_mode


def measure_latencies(
    models: Mapping[str, nn.Module],
    shape: tuple[int, int, int],
    *,
    batch: int = 1,
    repeats: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    choose: Callable[[Sequence[float]], float] = statistics.median,
    seconds: float = math.inf,
) -> dict[str, float]:
    """Measure the time of one forward pass of each network, in milliseconds: the median, or what ``choose`` returns.

    Each round times every network once, in turn. The networks run in eval mode, on their own device and in their own
    precision and layout, on one random batch.

    Args:
        models: networks by name, each with all its parameters on one device.
        shape: (C, H, W) of one image.
        batch: images per pass.
        repeats: rounds that count.
        warmup: rounds before these, which do not count.
        clock: returns seconds. For one thread the processor's clock leaves out the time of other jobs.
        choose: makes one number of a network's times. On a machine with other jobs ``min`` is closest to the truth: a
            pass on several threads waits for each thread that another job delays.
        seconds: time after which no further round begins, once one has counted.

    Returns:
        {name: milliseconds per pass}.

    Raises:
        ValueError: if there is nothing to time.
    """
    if not models or repeats < 1 or batch < 1:
        raise ValueError(f"{len(models)} networks, {repeats} repeats of batch {batch}: each must be at least 1")
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        tensor = next(iter(model.parameters()), torch.empty(0))
        batch_of = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(tensor)
        calls[name] = partial(model, batch_of)
    device = {name: _device_of(model) for name, model in models.items()}
    with in_eval_mode(*models.values()):
        return time_calls(calls, device, repeats=repeats, warmup=warmup, clock=clock, choose=choose, seconds=seconds)


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    devices: Mapping[str, torch.device],
    *,
    repeats: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
    choose: Callable[[Sequence[float]], float] = statistics.median,
    seconds: float = math.inf,
) -> dict[str, float]:
    """Measure the time of calls in milliseconds; each round makes every call once, in turn.

    Args:
        calls: calls by name, of networks in eval mode.
        devices: the device that each call uses.
        repeats: rounds that count.
        warmup: rounds before these, which do not count.
        clock: returns seconds.
        choose: makes one number of a call's times.
        seconds: time after which no further round begins, once one has counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.monotonic()
    with torch.inference_mode():
        for done in range(warmup + repeats):
            if done > warmup and time.monotonic() - begun > seconds:
                break
            for name, call in calls.items():
                _wait(devices[name])
                begin = clock()
                call()
                _wait(devices[name])
                times[name].append(clock() - begin)
    return {name: 1000 * choose(values[warmup:]) for name, values in times.items()}


def measure_latency(
    model: nn.Module, shape: tuple[int, int, int], *, batch: int = 1, repeats: int = 30, warmup: int = 3
) -> float:
    """Measure the median time of one forward pass in milliseconds; arguments as in ``measure_latencies``."""
    return measure_latencies({"": model}, shape, batch=batch, repeats=repeats, warmup=warmup)[""]


def _device_of(model: nn.Module) -> torch.device:
    return next(iter(model.parameters()), torch.empty(0)).device


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
