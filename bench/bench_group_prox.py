"""How fast group_prox_ is, beside what torch offers for one unit norm over several tensors.

    python bench/bench_group_prox.py [--device cpu|cuda] [--json FILE]

``loop`` goes layer by layer in plain torch. ``foreach`` gathers the norms of all layers first and scales all tensors
with ``torch._foreach_mul_``. ``copy`` moves as many bytes from one buffer to another, without arithmetic. Variants take
turns within each round, so that a busy machine slows all of them; medians over rounds.

``share`` is the bandwidth of fastprune as a part of that of ``copy``, counting three passes over the elements (read for
the norms, read and write for the scaling). It may exceed 1: units that fit a cache are fetched once.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastprune import _C, ops

SWEEP = [1_000, 10_000, 100_000, 1_000_000]

Unit = list[tuple[Tensor, int]]
"""The tensors of one layer's units, each with the dimension along which unit k has position k."""


class Layout:
    """Layers of units, none of which dies: every call reads and writes every element."""

    def __init__(self, name: str, layers: list[Unit]) -> None:
        self.name = name
        self.layers = layers
        self.sizes = [layer[0][0].size(layer[0][1]) for layer in layers]
        slices, first = [], 0
        for layer, size in zip(layers, self.sizes, strict=True):
            slices += [(tensor, dim, torch.arange(first, first + size)) for tensor, dim in layer]
            first += size
        self.table = ops.UnitTable(slices, first)
        self.elements = int(self.table.sizes.sum())
        self.threshold = torch.full((first,), 1e-5, device=self.table.device)
        # What the foreach variant needs to know, and the copy's buffers: not charged to them.
        self.tensors = [tensor for layer in layers for tensor, _ in layer]
        self.source = torch.randn(self.elements, device=self.table.device)
        self.target = torch.empty_like(self.source)

    @staticmethod
    def norms_of(layer: Unit) -> Tensor:
        """Over all tensors of the layer."""
        norms = [
            torch.linalg.vector_norm(tensor, dim=[d for d in range(tensor.ndim) if d != dim])
            if tensor.ndim > 1
            else tensor.abs()
            for tensor, dim in layer
        ]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)

    @staticmethod
    def along(factor: Tensor, tensor: Tensor, dim: int) -> Tensor:
        """In a shape that broadcasts."""
        return factor.view([-1 if d == dim else 1 for d in range(tensor.ndim)])

    def loop(self) -> Tensor:
        """Layer by layer."""
        norms = []
        for layer, threshold in zip(self.layers, self.threshold.split(self.sizes), strict=True):
            norms.append(self.norms_of(layer))
            factor = (1 - threshold / norms[-1]).clamp_(min=0)
            for tensor, dim in layer:
                tensor.mul_(self.along(factor, tensor, dim))
        return torch.cat(norms)

    def foreach(self) -> Tensor:
        """One factor for all layers, one multiplication for all tensors."""
        norms = torch.cat([self.norms_of(layer) for layer in self.layers])
        factors = (1 - self.threshold / norms).clamp_(min=0).split(self.sizes)
        by_tensor = [
            self.along(factor, tensor, dim)
            for layer, factor in zip(self.layers, factors, strict=True)
            for tensor, dim in layer
        ]
        torch._foreach_mul_(self.tensors, by_tensor)
        return norms

    def fastprune(self) -> Tensor:
        """The fused operator."""
        return ops.group_prox_(self.table, self.threshold)

    def copy(self) -> Tensor:
        """Two passes."""
        return self.target.copy_(self.source)

    def share(self, times: dict[str, float]) -> float:
        """Of the bandwidth of copy."""
        return (3 / times["fastprune"]) / (2 / times["copy"])


def resnet50(device: str, *, consumers: bool) -> list[Unit]:
    """A layer for each batch norm: the rows before it, its weight and bias; `consumers`: the columns behind it, too.

    Columns inside of the bottlenecks alone: a residual stream's channels are those of several batch norms.
    """
    model = torchvision.models.resnet50().requires_grad_(False).to(device)
    layers: list[Unit] = []
    convolution = model.conv1
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            convolution = module
            if consumers and name.endswith(("conv2", "conv3")):
                layers[-1].append((module.weight, 1))
        if isinstance(module, nn.BatchNorm2d):
            layers.append([(convolution.weight, 0), (module.weight, 0), (module.bias, 0)])
    if consumers:  # a convolution's elements belong to its rows or to its columns
        read = {id(tensor) for layer in layers for tensor, dim in layer if dim == 1}
        layers = [[(t, dim) for t, dim in layer if dim == 1 or id(t) not in read] for layer in layers]
    return layers


def layouts(device: str) -> Iterator[tuple[Layout, int]]:
    """Layouts with the number of rounds that each is worth."""
    yield Layout("ResNet-50: rows", resnet50(device, consumers=False)), 30
    yield Layout("ResNet-50: rows and columns", resnet50(device, consumers=True)), 30
    for size in SWEEP:
        rounds = max(15, min(300, 10_000_000 // size))
        yield Layout(f"{size:,} units of 1", [[(torch.randn(size, device=device), 0)]]), rounds
    for size in SWEEP:
        rounds = max(15, min(300, 1_000_000 // size))
        yield Layout(f"{size:,} units of 64", [[(torch.randn(size, 64, device=device), 0)]]), rounds


def seconds(variant: Callable[[], Tensor], device: str) -> float:
    """Wall time of a call. On CUDA of ten in a row, so that they overlap as in a training loop."""
    repeats = 10 if device == "cuda" else 1
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        variant()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def medians(layout: Layout, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of a call, by variant."""
    variants = {
        "loop": layout.loop,
        "foreach": layout.foreach,
        "copy": layout.copy,
        "fastprune": layout.fastprune,
    }
    results = [variant() for name, variant in variants.items() if name != "copy"]
    assert all(torch.allclose(result, results[0], atol=1e-4) for result in results)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 3):
        for name, variant in variants.items():
            elapsed = seconds(variant, device)
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
    title = (
        f"group_prox_, float32, {machine(arguments.device)}, torch {torch.__version__}, fastprune {build['version']}"
    )
    columns = ("layout", "loop, us", "foreach, us", "copy, us", "fastprune, us", "ns/element", "share", "vs loop")
    table = Table(*columns, title=title)
    results = []
    for layout, rounds in layouts(arguments.device):
        times = medians(layout, rounds, arguments.device)
        ours = times["fastprune"]
        row = (f"{times[name] * 1e6:,.0f}" for name in ("loop", "foreach", "copy", "fastprune"))
        per_element = f"{ours / layout.elements * 1e9:.2f}"
        table.add_row(layout.name, *row, per_element, f"{layout.share(times):.2f}", f"{times['loop'] / ours:.1f}x")
        results.append(
            {
                "layout": layout.name,
                "units": layout.table.num_units,
                "elements": layout.elements,
                "median_seconds": times,
                "share_of_copy_bandwidth": layout.share(times),
            }
        )
    Console(width=120).print(table)
    if arguments.json:
        document = {
            "benchmark": "group_prox",
            "machine": machine(arguments.device),
            "dtype": "float32",
            "torch": torch.__version__,
            "build": build,
            "results": results,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
