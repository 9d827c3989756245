"""How fast topk_mask is, beside what torch offers for ragged groups.

    python bench/bench_topk_mask.py [--device cpu|cuda] [--json FILE]

``loop`` is fastprune.reference: plain torch, group by group. ``padded`` is the best we could do with one torch.sort
over a padded matrix. Variants take turns within each round, so that a busy machine slows all of them; medians over
rounds. Scores are drawn anew for every call: repeated ones teach the CPU's branch predictor.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastprune import _C, ops, reference

Variant = Callable[[Tensor], Tensor]

# The 37 groups of ResNet-50: stem, 32 interior ones, 4 residual streams; 11,456 units.
RESNET50 = [64] + [64] * 6 + [128] * 8 + [256] * 12 + [512] * 6 + [256, 512, 1024, 2048]
SWEEP = [1_000, 10_000, 100_000, 1_000_000]


class Layout:
    """Channel groups with DDNP's window, a tenth of each group, half of it kept."""

    def __init__(self, name: str, sizes: list[int], device: str) -> None:
        self.name = name
        self.units = sum(sizes)
        self.sizes = torch.tensor(sizes, device=device)
        self.offsets = torch.tensor([0, *sizes]).cumsum(0).to(device)
        self.keep = torch.full((len(sizes),), 0.5, device=device)
        self.window = (0.1 * self.sizes).round()
        # What the padded variant needs to know about the groups, not charged to it.
        self.columns = torch.arange(max(sizes), device=device)
        self.inside = self.columns < self.sizes[:, None]

    def draw(self) -> Tensor:
        """Scores as DDNP's generator makes them."""
        return torch.randn(self.units, device=self.offsets.device).sigmoid()

    def loop(self, scores: Tensor) -> Tensor:
        """One sort a group."""
        return reference.topk_mask(scores, self.keep, self.offsets, self.window)

    def padded(self, scores: Tensor) -> Tensor:
        """One sort for all groups, each padded to the largest."""
        centre = self.sizes * self.keep
        width = torch.minimum(self.window, torch.minimum(2 * (self.sizes - centre), 2 * centre))
        t = ((centre[:, None] - (self.columns + 0.5)) / width[:, None]).clamp_(-0.5, 0.5)
        by_rank = -2 * t**3 + 1.5 * t + 0.5
        matrix = torch.full_like(by_rank, -torch.inf)
        matrix[self.inside] = scores
        order = torch.sort(matrix, dim=1, descending=True, stable=True).indices
        return torch.empty_like(matrix).scatter_(1, order, by_rank)[self.inside]

    def fastprune(self, scores: Tensor) -> Tensor:
        """The fused operator."""
        return ops.topk_mask(scores, self.keep, self.offsets, self.window)


def layouts(device: str) -> Iterator[tuple[Layout, int]]:
    """Layouts with the number of rounds that each is worth."""
    yield Layout("ResNet-50, 37 groups", RESNET50, device), 200
    for size in SWEEP:
        yield Layout(f"one group of {size:,}", [size], device), max(15, min(200, 2_000_000 // size))
    for size in SWEEP[:-1]:
        yield Layout(f"{SWEEP[-1] // size:,} groups of {size:,}", [size] * (SWEEP[-1] // size), device), 15


def seconds(variant: Variant, scores: Tensor) -> float:
    """Wall time until the result is there."""
    if scores.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    variant(scores)
    if scores.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(layout: Layout, rounds: int) -> dict[str, float]:
    """Median seconds of a call, by variant."""
    variants: dict[str, Variant] = {
        "loop": layout.loop,
        "padded": layout.padded,
        "fastprune": layout.fastprune,
    }
    scores = layout.draw()
    results = [variant(scores) for variant in variants.values()]
    assert all(torch.allclose(result, results[0], atol=1e-4) for result in results)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 3):
        for name, variant in variants.items():
            elapsed = seconds(variant, layout.draw())
            if number >= 3:  # warm by then
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def machine(device: str) -> str:
    """What the numbers were made on."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    with Path("/proc/cpuinfo").open() as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Measures, prints a table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    build = _C.build_info()
    title = f"topk_mask, float32, {machine(arguments.device)}, torch {torch.__version__}, fastprune {build['version']}"
    table = Table("layout", "loop, us", "padded, us", "fastprune, us", "ns/unit", "vs loop", "vs padded", title=title)
    results = []
    for layout, rounds in layouts(arguments.device):
        times = medians(layout, rounds)
        loop, padded, ours = times["loop"], times["padded"], times["fastprune"]
        per_unit = f"{ours / layout.units * 1e9:.1f}"
        ratios = f"{loop / ours:.1f}x", f"{padded / ours:.1f}x"
        table.add_row(layout.name, *(f"{t * 1e6:,.0f}" for t in (loop, padded, ours)), per_unit, *ratios)
        results.append({"layout": layout.name, "units": layout.units, "median_seconds": times})
    Console(width=120).print(table)
    if arguments.json:
        document = {
            "benchmark": "topk_mask",
            "machine": machine(arguments.device),
            "dtype": "float32",
            "torch": torch.__version__,
            "build": build,
            "results": results,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
