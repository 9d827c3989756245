"""How fast the stochastic gates are, forward and backward, beside what torch offers.

    python bench/bench_gates.py [--device cpu|cuda] [--json FILE]

``eager`` draws with torch.bernoulli or torch.rand and passes the gradient straight through with as few operators as
torch allows. ``reference`` is fastprune.reference, which draws the same bits as the kernel. Variants take turns within
each round, so that a busy machine slows all of them; medians over rounds.
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

Variant = Callable[[Tensor, int], Tensor]

UNITS = {"ResNet-50": 11_456, "1,000 units": 1_000, "100,000 units": 100_000, "1,000,000 units": 1_000_000}


def eager_bernoulli(theta: Tensor, _: int) -> Tensor:
    """torch.bernoulli; its gradient is that of the clamp."""
    inside = theta.clamp(0, 1)
    return torch.bernoulli(inside).sub_(inside.detach()).detach() + inside


def eager_gumbel(logits: Tensor, _: int) -> Tensor:
    """The hard Gumbel sigmoid as the releases write it."""
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-10, 1 - 2**-24)))
    soft = torch.sigmoid((logits + 3 + noise) / 0.4)
    return (soft >= 0.5).to(soft.dtype).sub_(soft.detach()) + soft


VARIANTS: dict[str, dict[str, Variant]] = {
    "bernoulli_gate": {
        "eager": eager_bernoulli,
        "reference": lambda theta, step: reference.bernoulli_gate(theta, seed=0, step=step),
        "fastprune": lambda theta, step: ops.bernoulli_gate(theta, seed=0, step=step),
    },
    "gumbel_gate": {
        "eager": eager_gumbel,
        "reference": lambda logits, step: reference.gumbel_gate(logits, seed=0, step=step),
        "fastprune": lambda logits, step: ops.gumbel_gate(logits, seed=0, step=step),
    },
}


def seconds(variant: Variant, values: Tensor, step: int) -> float:
    """Wall time until the gates and the gradient of their sum are there."""
    ones = torch.ones_like(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    torch.autograd.grad(variant(values, step), values, ones)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(name: str, units: int, device: str) -> dict[str, float]:
    """Median seconds of a forward and backward pass, by variant."""
    variants = VARIANTS[name]
    values = torch.rand(units, device=device)
    values = (values if name == "bernoulli_gate" else 4 * values - 5).requires_grad_()
    shares = {key: variant(values, 0).mean().item() for key, variant in variants.items()}
    assert shares["fastprune"] == shares["reference"]
    assert abs(shares["fastprune"] - shares["eager"]) < 4 * units**-0.5
    rounds = max(20, min(200, 5_000_000 // units))
    times: dict[str, list[float]] = {key: [] for key in variants}
    for number in range(rounds + 3):
        for key, variant in variants.items():
            elapsed = seconds(variant, values, number)
            if number >= 3:  # warm by then
                times[key].append(elapsed)
    return {key: statistics.median(measured) for key, measured in times.items()}


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
    title = f"gates, float32, {machine(arguments.device)}, torch {torch.__version__}, fastprune {build['version']}"
    table = Table("gate", "vector", "eager, us", "reference, us", "fastprune, us", "vs eager", title=title)
    results = []
    for name in VARIANTS:
        for vector, units in UNITS.items():
            times = medians(name, units, arguments.device)
            table.add_row(
                name,
                vector,
                *(f"{t * 1e6:,.0f}" for t in times.values()),
                f"{times['eager'] / times['fastprune']:.1f}x",
            )
            results.append({"gate": name, "units": units, "median_seconds": times})
    Console(width=120).print(table)
    if arguments.json:
        document = {
            "benchmark": "gates",
            "machine": machine(arguments.device),
            "dtype": "float32",
            "torch": torch.__version__,
            "build": build,
            "results": results,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
