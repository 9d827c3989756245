"""The measurement of a network's operators, and its latency model."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from fastprune.graph.latency.calls import Call, Timer
from fastprune.graph.latency.measurements import Measurements
from fastprune.graph.latency.model import LatencyModel
from fastprune.graph.latency.operations import Measured, Table
from fastprune.graph.latency.recording import record
from fastprune.graph.latency.segments import Segment, split_segments
from fastprune.graph.latency.stopwatch import Stopwatch, pool_bytes
from fastprune.graph.structure import GraphStructure
from fastprune.host import progress
from fastprune.host.cache import cache_folder
from fastprune.host.distributed import Distributed
from fastprune.host.machine import machine

ALONE = Distributed()


def measure(
    graph: GraphStructure,
    device: torch.device,
    batch: int,
    dtype: torch.dtype,
    *,
    channels_last: bool = False,
    cache: bool = True,
    timer: Timer | None = None,
    call_ms: float | None = None,
    peers: Distributed = ALONE,
) -> LatencyModel:
    """Measure a network's operators, or take their times from disk.

    Args:
        graph: the network.
        device: the device that runs the network.
        batch: samples in a pass.
        dtype: dtype of parameters and inputs.
        channels_last: whether parameters and inputs have this memory layout.
        cache: whether times are kept on disk, and taken from there.
        timer: the timer of calls; None = the device's usual one.
        call_ms: milliseconds that the call of a module takes; None = measured.
        peers: processes that take the times of the first one.
    """
    if not peers.is_main:
        timer, call_ms, cache = time_nothing, 0.0, False
    recording = record(graph, device, batch, dtype, channels_last=channels_last)
    known = Measurements(cache_folder("latency"), facts(device, dtype, channels_last, pool_bytes(recording.footprint)))
    parts = split_segments(recording.operations)
    found, missing = look_up(parts, known if cache else None)
    if missing:
        stopwatch = Stopwatch(device, recording.footprint, timer)
        with progress.begin("measuring layers", len(missing), wanted=peers.is_main) as work:
            for name, part in missing.items():
                found[name] = stopwatch.tables(part)
                if cache:
                    known.put(part.key, found[name])
                work.advance()
    measured = [
        Measured(operation, table)
        for part in parts
        for operation, table in zip(part.operations, found[str(part.key)], strict=True)
    ]
    modules = {name for operation in recording.operations for name in operation.modules}
    overhead = len(modules) * (module_call_ms() if call_ms is None else call_ms)
    model = LatencyModel(
        graph.offsets, measured, overhead, machine(device), batch, dtype, channels_last, torch.get_num_threads()
    )
    return model if peers.world_size == 1 else model.with_times(peers.broadcast_(model.times()))


def look_up(parts: Sequence[Segment], known: Measurements | None) -> tuple[dict[str, list[Table]], dict[str, Segment]]:
    """Return {key: tables} of the known segments and {key: segment} of the others; equal segments are one."""
    found: dict[str, list[Table]] = {}
    missing: dict[str, Segment] = {}
    for part in parts:
        name = str(part.key)
        if name not in found and name not in missing:
            tables = known.get(part.key, part.shapes) if known is not None else None
            if tables is None:
                missing[name] = part
            else:
                found[name] = tables
    return found, missing


def time_nothing(calls: Sequence[Call]) -> list[float]:
    """Return no time for each call; the timer of processes that wait for another's measurement."""
    return [0.0] * len(calls)


def facts(device: torch.device, dtype: torch.dtype, channels_last: bool, pool: int) -> dict[str, str]:
    """Return all facts that times depend on, besides shapes."""
    found = {
        "device": machine(device),
        "torch": torch.__version__,
        "dtype": str(dtype),
        "layout": "channels_last" if channels_last else "contiguous",
        "touched": str(pool),
    }
    if device.type == "cuda":
        return found | {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "tf32": str((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)),
            "tuned": str(torch.backends.cudnn.benchmark),
        }
    return found | {
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def module_call_ms(calls: int = 2000, repeats: int = 7) -> float:
    """Measure the milliseconds that the call of a module takes beyond its operators."""
    module, x = nn.Identity(), torch.zeros(1)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            module(x)
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times) / calls
