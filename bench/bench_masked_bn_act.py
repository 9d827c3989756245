"""How fast the passes between convolutions are, beside a copy of the same memory and beside eager torch.

    python bench/bench_masked_bn_act.py [--device cpu|cuda] [--layout channels_last|contiguous] [--json FILE]

The activations are those of ResNet-50, at batch 8 in float32 on the CPU and at batch 256 in bfloat16 on CUDA. The
``backward`` pass reads dy and the saved activation and writes dx: three streams, with the gradient of the mask on the
way; its bandwidth stands beside that of ``copy_`` (two streams), in the same run. ``forward`` is
ops.masked_bn_act with a gradient to come (reads x, writes y and what it saves), ``eager`` fastprune.reference; ``step``
is forward and backward of both. Variants take turns within each round, so that a busy machine slows all of them;
medians over rounds.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastprune import _C, ops, reference
from fastprune.ops.masked_act import masked_act

# channels, height and width; how often ResNet-50 normalises such an activation.
RESNET50 = [
    (64, 112, 1),
    (64, 56, 6),
    (256, 56, 4),
    (128, 56, 1),
    (128, 28, 7),
    (512, 28, 5),
    (256, 28, 1),
    (256, 14, 11),
    (1024, 14, 7),
    (512, 14, 1),
    (512, 7, 5),
    (2048, 7, 4),
]


class Activation:
    """One activation of the network, with everything that its passes read and write."""

    def __init__(self, channels: int, size: int, batch: int, device: str, layout: str) -> None:
        self.name = f"{channels} x {size} x {size}"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        shape = (batch, channels, size, size)
        self.x, self.dy = (
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format) for _ in range(2)
        )
        self.bn = tuple(torch.rand(channels, device=device) + 0.5 for _ in range(4))
        self.mask = (torch.rand(channels, device=device) > 0.5).float()
        self.saved = masked_act(self.x, want_saved=True)[1]
        self.dx, self.dmask = torch.empty_like(self.x), torch.empty_like(self.mask)
        self.bytes = self.x.numel() * self.x.element_size()
        self.partials = None
        if device == "cuda":
            count = _C.masked_act_partials(self.dy, self.saved, None, self.dx)
            self.partials = torch.empty(count, dtype=torch.float64, device=device)

    def copy(self) -> None:
        """Two streams: what the memory can do."""
        self.dx.copy_(self.dy)

    def backward(self) -> None:
        """Three streams."""
        arguments = self.dy, self.saved, None, self.mask, self.bn[0], None, None, None, "relu"
        _C.masked_act_backward(
            *arguments, self.dx, self.dmask, None, None, self.partials, num_threads=torch.get_num_threads()
        )

    def _leaves(self) -> tuple[Tensor, Tensor]:
        return self.x.detach().requires_grad_(), self.mask.detach().requires_grad_()

    def forward(self, function: Callable[..., Tensor]) -> None:
        """With a frozen batch norm, as in gate training."""
        x, mask = self._leaves()
        function(x, self.bn, mask)

    def step(self, function: Callable[..., Tensor]) -> None:
        """Forward, and the gradients of x and mask."""
        x, mask = self._leaves()
        torch.autograd.grad(function(x, self.bn, mask), (x, mask), self.dy)


def seconds(variant: Callable[[], None], device: str) -> float:
    """Wall time until the result is there."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    variant()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_seconds(variant: Callable[[], None]) -> float:
    """Time on the GPU of one call in a row of twenty, launches hidden."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        variant()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 20 / 1000


def medians(activation: Activation, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of a call, by variant."""
    variants: dict[str, Callable[[], None]] = {
        "copy": activation.copy,
        "backward": activation.backward,
        "forward": lambda: activation.forward(ops.masked_bn_act),
        "eager forward": lambda: activation.forward(reference.masked_bn_act),
        "step": lambda: activation.step(ops.masked_bn_act),
        "eager step": lambda: activation.step(reference.masked_bn_act),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 3):
        for name, variant in variants.items():
            elapsed = device_seconds(variant) if device == "cuda" else seconds(variant, device)
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
    parser.add_argument("--layout", choices=["channels_last", "contiguous"], default="channels_last")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    device, batch = arguments.device, 256 if arguments.device == "cuda" else 8
    dtype = "bfloat16" if device == "cuda" else "float32"
    build = _C.build_info()
    title = f"masked_bn_act, {dtype}, {arguments.layout}, batch {batch}, {machine(device)}, torch {torch.__version__}"
    columns = ["copy, GB/s", "backward, GB/s", "share", "forward, us", "vs eager", "step, us", "vs eager"]
    table = Table("activation", "MB", *columns, title=title)
    results, totals = [], dict.fromkeys(("copy", "backward", "bytes"), 0.0)
    for channels, size, count in RESNET50:
        activation = Activation(channels, size, batch, device, arguments.layout)
        times = medians(activation, arguments.rounds, device)
        copy, backward = 2 * activation.bytes / times["copy"], 3 * activation.bytes / times["backward"]
        row = [f"{copy / 1e9:.1f}", f"{backward / 1e9:.1f}", f"{backward / copy:.0%}"]
        for name in ("forward", "step"):
            row += [f"{times[name] * 1e6:,.0f}", f"{times['eager ' + name] / times[name]:.1f}x"]
        table.add_row(activation.name, f"{activation.bytes / 1e6:.1f}", *row)
        results.append(
            {"activation": activation.name, "count": count, "bytes": activation.bytes, "median_seconds": times}
        )
        totals["bytes"] += count * activation.bytes
        totals["copy"] += count * times["copy"]
        totals["backward"] += count * times["backward"]
    copy, backward = 2 * totals["bytes"] / totals["copy"], 3 * totals["bytes"] / totals["backward"]
    total = [f"{copy / 1e9:.1f}", f"{backward / 1e9:.1f}", f"{backward / copy:.0%}"]
    table.add_row("whole network", f"{totals['bytes'] / 1e6:.0f}", *total)
    Console(width=140).print(table)
    if arguments.json:
        document = {
            "benchmark": "masked_bn_act",
            "machine": machine(device),
            "dtype": dtype,
            "layout": arguments.layout,
            "batch": batch,
            "torch": torch.__version__,
            "build": build,
            "backward_share_of_copy": backward / copy,
            "results": results,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
