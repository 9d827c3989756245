"""Where the time of a search step goes: the device's time by kernel, ours and the same step in plain PyTorch.

    python bench/profile_step.py --device cuda --json profile.json

``host_ms`` is the time in which the host has given all work of a step to the device, ``step_ms`` the time until the
device has done it: a device that waits for its host has nearly the same of both. On the CPU kernels are operators.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastprune.bench.eager_search import Flops
from fastprune.bench.search import KEEP_RATIO, METHODS, plain_networks
from fastprune.bench.step import draw_batch, networks, prepare
from fastprune.engine import Placement
from fastprune.graph import trace
from fastprune.host import atomic
from fastprune.host.machine import machine

STEPS = 10
LINES = 25


def profile_step(step: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device, steps: int) -> dict[str, Any]:
    """Return the times of a step, and of its kernels, the longest first."""
    on_cuda = device.type == "cuda"

    def wait() -> None:
        if on_cuda:
            torch.cuda.synchronize()

    for _ in range(3):
        step(*inputs)
    host, whole = [], []
    for _ in range(steps):
        wait()
        began = time.perf_counter()
        step(*inputs)
        host.append(time.perf_counter() - began)
        wait()
        whole.append(time.perf_counter() - began)
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step(*inputs)
        wait()
    attribute = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    rows = [
        {"kernel": row.key, "calls": row.count / steps, "ms": getattr(row, attribute) / 1e3 / steps}
        for row in profiler.key_averages()
    ]
    rows.sort(key=lambda row: -row["ms"])
    return {
        "host_ms": 1e3 * statistics.median(host),
        "step_ms": 1e3 * statistics.median(whole),
        "launches": sum(row["calls"] for row in rows if row["ms"] > 0),
        "kernels": [row for row in rows if row["ms"] > 0],
    }


def main() -> None:
    """Profile DDNP's step on ResNet-50, or on a small network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--method", default="ddnp", choices=sorted(METHODS))
    parser.add_argument("--network", default="ResNet-50", choices=["ResNet-50", "ResNet-56"])
    parser.add_argument("--quick", action="store_true", help="a few steps of a small network, as a check")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    found = networks(device, quick=arguments.quick)
    name = next(iter(found)) if arguments.quick else arguments.network
    make, batch, side = found[name]
    placement = Placement(device, "bf16" if device.type == "cuda" else "float32")
    model = prepare(make(), device, torch.float32)
    graph = trace(model, torch.zeros(1, 3, side, side, device=device))
    ours = METHODS[arguments.method](graph, model, placement)
    plain = plain_networks(model, device)["eager channels_last"]
    flops = Flops(plain.network, torch.zeros(1, 3, side, side, device=device), KEEP_RATIO)
    classes: Any = model.fc.out_features
    inputs = draw_batch(batch, side, classes, device)
    measure = partial(profile_step, inputs=inputs, device=device, steps=2 if arguments.quick else STEPS)
    document: dict[str, Any] = {"machine": machine(device), "torch": torch.__version__, "method": arguments.method}
    document.update(network=name, batch=batch, steps={})
    for kind, step in {"fastprune": ours, "eager": ours.make_peer(plain, flops)}.items():
        result = document["steps"][kind] = measure(step)
        print(
            f"{kind}: host {result['host_ms']:.2f} ms, step {result['step_ms']:.2f} ms, {result['launches']:g} launches"
        )
        for row in result["kernels"][:LINES]:
            print(f"  {row['ms']:8.3f} ms {row['calls']:6.1f} x  {row['kernel'][:100]}")
        if arguments.json:
            atomic.write_text(arguments.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
