"""The limits of this machine, measured in the same run as the variants."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastprune.bench.timing import Clock

REPEATS = 7
LARGEST_COPY = 1 << 30  # bytes; all caches of some servers together have a gigabyte
PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Ceilings:
    """The best rates of one device, with torch's current number of threads.

    Args:
        device: the device.
        cache_bytes: size of its last cache (one of them, where several cores share each).
        bandwidth: bytes read and written per second by a copy that no cache holds.
        overhead: seconds of a nearly empty call, from call to result.
        quick: whether to measure on small sizes, for tests: the numbers mean nothing.
        rates: floating-point operations per second by precision, each measured at its first use.
    """

    device: torch.device
    cache_bytes: int
    bandwidth: float
    overhead: float
    quick: bool = False
    rates: dict[str, float] = field(default_factory=dict)

    @classmethod
    def measure(cls, device: torch.device, *, quick: bool = False) -> Ceilings:
        """Measure bandwidth and overhead."""
        cache = 1 << 20 if quick else last_cache(device)
        return cls(device, cache, copy_bandwidth(device, cache), call_overhead(device), quick)

    def rate(self, precision: str) -> float:
        """Return the floating-point operations per second of a large matrix product."""
        if precision not in self.rates:
            self.rates[precision] = matmul_rate(self.device, precision, quick=self.quick)
        return self.rates[precision]

    def least_seconds(self, nbytes: float, flops: float, precision: str) -> float:
        """Return the roofline: the time of the work if only memory or arithmetic limits it."""
        return max(nbytes / self.bandwidth, flops / self.rate(precision))

    def describe(self) -> dict[str, Any]:
        """Return the rates for programs."""
        return {
            "copy_bytes_per_second": self.bandwidth,
            "matmul_flops_per_second": dict(self.rates),
            "call_seconds": self.overhead,
            "cache_bytes": self.cache_bytes,
        }


def last_cache(device: torch.device) -> int:
    """Return the bytes of the largest cache that the system reports; 32 MiB if it reports none."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=32 << 20)


def copy_bandwidth(device: torch.device, cache_bytes: int) -> float:
    """Return the best rate of three sizes beyond the cache, each copied several times."""
    sizes = {min(factor * cache_bytes, LARGEST_COPY) for factor in (4, 8, 16)}
    return max(2 * size / best_seconds(device, *copy_call(device, size)) for size in sizes)


def copy_call(device: torch.device, size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the function and arguments of a copy of ``size`` bytes."""
    source = torch.ones(size // 4, device=device)
    return torch.Tensor.copy_, (torch.zeros_like(source), source)


def matmul_rate(device: torch.device, precision: str, *, quick: bool) -> float:
    """Return the best rate of two sizes, on random values: a GPU that multiplies zeros clocks higher."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: needs one of {', '.join(PRECISIONS)}")
    sizes = (128,) if quick else (4096, 8192) if device.type == "cuda" else (1024, 2048)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        rates = []
        for size in sizes:
            left, right = (torch.randn(size, size, device=device).to(PRECISIONS[precision]) for _ in range(2))
            rates.append(2 * size**3 / best_seconds(device, torch.mm, (left, right)))
    finally:
        torch.set_float32_matmul_precision(before)
    return max(rates)


def call_overhead(device: torch.device) -> float:
    """Return the median time of an operator on one number."""
    clock, arguments = Clock(device), (torch.ones(1, device=device),)
    return statistics.median(clock(torch.neg, arguments) for _ in range(100))


def best_seconds(device: torch.device, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Return the fastest of several calls, which shows what the machine can do undisturbed."""
    clock = Clock(device, events=True)
    clock(function, arguments)
    return min(clock(function, arguments) for _ in range(REPEATS))
