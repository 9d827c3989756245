"""The demonstration: a network trained, pruned and fine-tuned on real data, offline, in about a minute."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune import models
from fastprune.cli.networks import image_shape
from fastprune.cli.settings import DemoSettings, pick
from fastprune.data import Data, load_data
from fastprune.engine import (
    LoopOptions,
    RunDirectory,
    RunError,
    TrainConfig,
    choose_device,
    evaluate,
    measure_latencies,
    train,
)
from fastprune.engine.device import Placement
from fastprune.engine.run import plain
from fastprune.pruning import PruningResult, prune
from fastprune.report import tables

BASELINE = TrainConfig(epochs=12, batch_size=64, lr=0.1, schedule="cosine", evaluate_every=0)
# The gates begin wide open, at 1, and Adam moves them by about the learning rate per step: with 0.01, these 840 steps
# are enough for every gate to cross ½, where it closes, and to come back.
SEARCH: dict[str, Any] = {"epochs": 40, "batch_size": 64, "learning_rate": 0.01, "evaluate_every": 0}
FINETUNE = TrainConfig(epochs=10, batch_size=64, lr=0.01, schedule="cosine", evaluate_every=0)


def run_demo(values: dict[str, Any], given: set[str]) -> int:
    """Train, prune and fine-tune a small network on real data, offline."""
    result = demo(pick(DemoSettings, values))
    if values["json"]:
        print(json.dumps(result))
    else:
        tables.print_demo(result)
        print("next: fastprune inspect --model torchvision:resnet50")
    return 0


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Train ResNet-20 on scikit-learn's digits, prune it with DMC to half of its MACs, fine-tune it.

    Args:
        settings: directory, seed and device.

    Returns:
        ``{"run": directory, "seconds": …, "stages": [{"stage", "accuracy", "macs", "params", "latency_ms"}, …]}`` with
        the stages "trained", "pruned" and "fine-tuned"; accuracies on the test set, latencies on one core of the CPU,
        for a batch of 64.

    Raises:
        RunError: if ``settings.out`` exists already.
    """
    with one_thread():
        return show_pruning(settings)


def show_pruning(settings: DemoSettings) -> dict[str, Any]:
    """Do what ``demo`` does, with all threads of torch."""
    begun = time.monotonic()
    out = Path(settings.out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    if out.exists():  # refused before the first training, not after it
        raise RunError(f"{str(out)!r} exists already: give another --out")
    data = load_data("digits", seed=settings.seed)
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    model = models.create("resnet20", num_classes=data.num_classes, in_channels=image_shape(data)[0])
    quiet = LoopOptions(log_every=20)
    train(model, data, BASELINE, seed=settings.seed, device=device, options=quiet)
    result = prune(
        model, torch.zeros(2, *data.shape), method="dmc", budget="flops=0.5", data=data, out=out, seed=settings.seed,
        device=settings.device, loop=quiet,
        run_config={"command": "demo", "model": "resnet20", "data": "digits", "method": "dmc", "budget": "flops=0.5",
                    "seed": settings.seed, "train": plain(asdict(BASELINE)), "finetune": plain(asdict(FINETUNE))},
        **SEARCH,
    )  # fmt: skip
    pruned = copy.deepcopy(result.model)
    run = RunDirectory.open(out)
    train(result.model, data, FINETUNE, run=run, seed=settings.seed, device=device, options=quiet, stage="finetune")
    networks: dict[str, nn.Module] = {"trained": model, "pruned": pruned, "fine-tuned": result.model}
    stages = measure_stages(networks, result, data, device)
    outcome = {"run": str(out), "seconds": time.monotonic() - begun, "stages": stages}
    trained, cut, tuned = ({name: value for name, value in stage.items() if name != "stage"} for stage in stages)
    run.log({"stage": "result", "method": "dmc", "budget": "flops=0.5", "baseline": trained, "compact": cut})
    run.log({"stage": "result", "method": "finetune", "compact": tuned})
    run.log({"stage": "result", **outcome})
    return outcome


def measure_stages(
    networks: Mapping[str, nn.Module], result: PruningResult, data: Data, device: torch.device
) -> list[dict[str, Any]]:
    """Measure accuracy, size and latency of the network after each stage."""
    accuracies = {
        stage: evaluate(network.to(device), data, placement=Placement(device))["accuracy"]
        for stage, network in networks.items()
    }
    latencies = measure_latencies(
        {stage: network.cpu() for stage, network in networks.items()}, image_shape(data), batch=64
    )
    stages = []
    for stage in networks:
        size = "full" if stage == "trained" else "planned"
        stages.append({
            "stage": stage, "accuracy": accuracies[stage], "macs": result.metrics["macs"][size],
            "params": result.metrics["params"][size], "latency_ms": latencies[stage],
        })  # fmt: skip
    return stages


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread.

    The layers take microseconds: a second thread gains next to nothing on idle cores, and on busy cores every layer
    waits for it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
