"""``fastprune bench …``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fastprune.bench.case import BenchmarkError
from fastprune.bench.latency import LatencyBenchSettings, bench_latency
from fastprune.bench.passes import PassesBenchSettings, bench_passes
from fastprune.bench.run import (
    KernelBenchSettings,
    SearchBenchSettings,
    StepBenchSettings,
    bench_kernels,
    bench_search,
    bench_step,
)
from fastprune.cli.networks import build_model, check_fit, input_shape, make_example
from fastprune.cli.settings import ModelSettings, pick


def run_kernels(values: dict[str, Any], given: set[str]) -> int:
    """Time the kernels beside their peers."""
    return time_cases(lambda: bench_kernels(pick(KernelBenchSettings, values)))


def run_step(values: dict[str, Any], given: set[str]) -> int:
    """Time a step of gate training beside the same in plain PyTorch."""
    return time_cases(lambda: bench_step(pick(StepBenchSettings, values)))


def run_search(values: dict[str, Any], given: set[str]) -> int:
    """Time the search steps of DMC and DDNP beside the same in plain PyTorch."""
    return time_cases(lambda: bench_search(pick(SearchBenchSettings, values)))


def run_latency(values: dict[str, Any], given: set[str]) -> int:
    """Compare modelled latencies of random plans with measured ones."""
    settings, network = pick(LatencyBenchSettings, values), pick(ModelSettings, values)
    model, shape = build_model(network, None), input_shape(network, None)
    check_fit(model, network.model, make_example(shape))
    bench_latency(settings, model, shape)
    return 0


def run_passes(values: dict[str, Any], given: set[str]) -> int:
    """Count how often a search step passes over activations."""
    bench_passes(pick(PassesBenchSettings, values))
    return 0


def time_cases(benchmark: Callable[[], object]) -> int:
    """Run a benchmark; the exit code says whether all variants agreed."""
    try:
        benchmark()
    except BenchmarkError as error:
        print(f"fastprune: error: {error}", file=sys.stderr)
        return 1
    return 0
