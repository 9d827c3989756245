"""The demonstration: a network trained, pruned and fine-tuned on real data, offline, in about a minute."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune import models
from fastprune.engine import (
    LoopOptions,
    RunDirectory,
    TrainConfig,
    choose_device,
    evaluate,
    load_data,
    measure_latencies,
    train,
)
from fastprune.engine.device import Placement
from fastprune.pruning import prune

BASELINE = TrainConfig(epochs=12, batch_size=64, lr=0.1, schedule="cosine", evaluate_every=0)
SEARCH: dict[str, Any] = {"epochs": 30, "batch_size": 128, "lr": 0.01}
FINETUNE = TrainConfig(epochs=8, batch_size=64, lr=0.05, schedule="cosine", evaluate_every=0)


@dataclass
class DemoSettings:
    """The demonstration's settings."""

    out: str | None = field(default=None, metadata={"help": "directory for the run's files; runs/demo-TIME without it"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    device: str = field(default="cpu", metadata={"help": "auto, cpu, cuda or cuda:N"})


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Train ResNet-20 on scikit-learn's digits, prune it with DMC to half of its MACs, fine-tune it.

    Args:
        settings: where to write, the seed, the device.

    Returns:
        ``{"run": directory, "seconds": …, "stages": [{"stage", "accuracy", "macs", "params", "latency_ms"}, …]}`` with
        the stages "trained", "pruned" and "fine-tuned"; accuracies on the test set, latencies for a batch of 64.
    """
    begun = time.monotonic()
    out = Path(settings.out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    data = load_data("digits", seed=settings.seed)
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    model = models.create("resnet20", num_classes=data.num_classes, in_channels=data.shape[0])
    quiet = LoopOptions(log_every=20)
    train(model, data, BASELINE, seed=settings.seed, device=device, options=quiet)
    result = prune(
        model, torch.zeros(2, *data.shape), method="dmc", budget="flops=0.5", data=data, out=out, seed=settings.seed,
        device=settings.device, loop=quiet,
        run_config={"command": "demo", "model": "resnet20", "data": "digits", "method": "dmc", "budget": "flops=0.5",
                    "seed": settings.seed, "dmc": SEARCH, "train": plain(BASELINE), "finetune": plain(FINETUNE)},
        **SEARCH,
    )  # fmt: skip
    pruned = copy.deepcopy(result.model)
    run = RunDirectory.open(out)
    train(result.model, data, FINETUNE, run=run, seed=settings.seed, device=device, options=quiet, stage="finetune")
    networks: dict[str, nn.Module] = {"trained": model, "pruned": pruned, "fine-tuned": result.model}
    latencies = measure_latencies(networks, data.shape, batch=64)
    stages = []
    for stage, network in networks.items():
        size = "full" if stage == "trained" else "planned"
        accuracy = evaluate(network, data, placement=Placement(device))["accuracy"]
        stages.append({
            "stage": stage, "accuracy": accuracy, "macs": result.metrics["macs"][size],
            "params": result.metrics["params"][size], "latency_ms": latencies[stage],
        })  # fmt: skip
    outcome = {"run": str(out), "seconds": time.monotonic() - begun, "stages": stages}
    run.log({"stage": "result", **outcome})
    return outcome


def plain(config: TrainConfig) -> dict[str, Any]:
    """A recipe as YAML values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
