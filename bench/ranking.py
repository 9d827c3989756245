"""Ranking of sub-networks by the proxies of SP and AutoSlim, after Fig. 4 of SP's paper.

Random sub-networks of one cost, drawn like the first ones of SP's search, are trained from scratch. They are also
measured with shared weights, by each method's own proxy after its own training. The program prints both proxies and the
test accuracy of each network, and Spearman's rank correlations. With several seeds it also prints the correlation of
the first two, which bounds what a proxy can predict. The paper's third method, MetaPruning, is not included.

    python bench/ranking.py --data fashion-mnist:FOLDER --weights runs/base/model.safetensors --json ranking.json

Training from scratch takes the longest. ``--scratch FILE`` stores each accuracy at once, for later runs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from fastprune.data import load_data
from fastprune.data.data import Data
from fastprune.engine import HeldOut, Placement, TrainConfig, evaluate, run_phases, train
from fastprune.graph import trace
from fastprune.host import atomic
from fastprune.host.distributed import Distributed
from fastprune.host.machine import machine
from fastprune.methods.contract import Task
from fastprune.methods.registry import configure
from fastprune.methods.sp.autoslim import AutoSlim
from fastprune.methods.sp.evolution import Evolution
from fastprune.methods.sp.sp import SP, variance
from fastprune.methods.sp.weight_sharing import WeightSharing
from fastprune.models import create, load_weights
from fastprune.planning.budget import Budget
from fastprune.planning.limits import Limits
from fastprune.surgery import apply
from fastprune.training.phases import Phase

BAND = 0.02  # width of the band of costs below the budget, relative to the full network
ATTEMPTS = 20_000  # greatest number of draws per sub-network in the band


def random_gene(evolution: Evolution, rng: np.random.Generator) -> list[int]:
    """Draw a gene like those of the first generation."""
    gene: list[int] = evolution.space.repair(evolution.random_genes(1, rng), rng)[0].tolist()
    return gene


class TrainingOnly:
    """A method without its search, for the loop.

    Args:
        method: the method after ``setup``.
    """

    def __init__(self, method: WeightSharing) -> None:
        self.method, self.trains_weights = method, True

    def phases(self, task: Task) -> Iterator[Phase]:
        """Return the phases of training."""
        return self.method.train(task, "training")

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state."""
        return dict(self.method.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the method's state."""
        self.method.load_state_dict(state)


def prepare(
    kind: type[WeightSharing],
    model: nn.Module,
    data: Data,
    placement: Placement,
    budget: str,
    epochs: int,
    batch_size: int,
    **more: Any,
) -> tuple[Any, Task]:
    """Set up a method on a copy of the model."""
    network = copy.deepcopy(model).to(placement.device)
    graph = trace(network, torch.zeros(2, *data.shape, device=placement.device))
    task = Task(
        network,
        graph,
        Budget.parse(budget),
        Limits(),
        device=placement.device,
        data=HeldOut(data, placement, Distributed()),
        rng=torch.Generator().manual_seed(0),
    )
    options = {"epochs": epochs, "batch_size": batch_size, "evaluate_every": 1, **more}
    method = kind(configure(kind, options))
    method.setup(task)
    return method, task


def run_training(method: WeightSharing, task: Task, data: Data, placement: Placement) -> None:
    """Train the network together with its sub-networks."""
    metrics = run_phases(TrainingOnly(method), task, data, placement=placement)
    print(method.name, {name: round(value, 4) for name, value in metrics.items()}, flush=True)


def draw(method: SP, task: Task, count: int, seed: int) -> list[Tensor]:
    """Draw masks [U] of random sub-networks within the budget, and at most ``BAND`` below it.

    As in the first generations of SP's search, the stages' quotas are drawn first, and then widths within them.

    Raises:
        ValueError: if these networks hardly ever have such a cost; the message gives their costs.
    """
    rng = np.random.default_rng(seed)
    search = method.search
    full, limit = float(task.budget.cost(task.graph)), task.budget.limit(task.graph)
    masks: list[Tensor] = []
    costs: list[float] = []
    while len(masks) < count:
        levels = random_gene(search.manager, rng)
        genes = [random_gene(search.make_evolution(stage, level), rng) for stage, level in enumerate(levels)]
        mask = method.mask([stage.widths(gene) for stage, gene in zip(search.stages, genes, strict=True)], task)
        costs.append(float(task.budget.cost(task.graph, mask)))
        if limit - BAND * full <= costs[-1] <= limit:
            masks.append(mask)
        if len(costs) > ATTEMPTS * (len(masks) + 1):
            ratios = torch.tensor(costs) / full
            low, median, high = (float(ratio) for ratio in (ratios.min(), ratios.median(), ratios.max()))
            raise ValueError(
                f"budget '{task.budget}': networks of random widths cost {low:.2f} to {high:.2f} of the full network, "
                f"mostly about {median:.2f}; give a budget in this range"
            )
    return masks


@torch.no_grad()
def distances(method: SP, masks: list[Tensor], images: Tensor) -> tuple[list[list[float]], list[float]]:
    """Return the stages' losses with trained adaptors, the paper's proxy, and the variances of their features."""
    features = method.net.features(images)
    pairs = range(len(method.stages))
    losses = [[float(method.net.distance(n, features[n], features[n + 1], mask)) for n in pairs] for mask in masks]
    return losses, [float(variance(y)) for y in features[1:]]


@torch.no_grad()
def shared_scores(method: AutoSlim, masks: list[Tensor], images: Tensor, labels: Tensor) -> list[tuple[float, float]]:
    """Return AutoSlim's proxy, the accuracy with shared weights, and the cross-entropy."""
    results = []
    for mask in masks:
        scores = method.frozen(images, mask=mask)
        accuracy = (scores.argmax(1) == labels).double().mean()
        results.append((float(accuracy), float(F.cross_entropy(scores, labels))))
    return results


def widths_of(task: Task, mask: Tensor) -> list[int]:
    """Return the width of each group."""
    return [kept for kept, _ in task.graph.plan(mask).widths.values()]


def describe(data: Data, spec: str) -> dict[str, Any]:
    """Return the facts that identify data, without a folder's name."""
    sizes = {"train": data.size("train"), "test": data.size("test")}
    return {"kind": spec.partition(":")[0], "shape": list(data.shape), "classes": data.num_classes, **sizes}


class FromScratch:
    """The test accuracies of compact networks trained from random weights.

    Args:
        file: file that stores them, or None; only one process may use it.
        settings: settings of the training; those in the file must be the same.

    Raises:
        ValueError: if the file holds accuracies of other trainings, or its folder is missing.
    """

    def __init__(self, file: Path | None, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, dict(settings)
        self.known: dict[str, float] = {}
        if file and not file.parent.is_dir():
            raise ValueError(f"scratch {file}: there is no folder {str(file.parent)!r}")
        if file and file.exists():
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved["settings"] != json.loads(json.dumps(self.settings)):
                raise ValueError(f"scratch {file}: has settings {saved['settings']}; this run has {self.settings}")
            self.known = saved["accuracies"]

    def accuracy(self, task: Task, mask: Tensor, data: Data, seed: int) -> float:
        """Return the accuracy of a mask's network for one seed."""
        name = f"{'-'.join(map(str, widths_of(task, mask)))} seed {seed}"
        if name not in self.known:
            torch.manual_seed(seed)
            fresh = create(self.settings["model"], num_classes=data.num_classes, in_channels=data.shape[0])
            compact = apply(task.graph.plan(mask), fresh, check=False)
            train(compact, data, TrainConfig(**self.settings["training"]), seed=seed, device="cpu")
            self.known[name] = evaluate(compact, data)["accuracy"]
            print(name, self.known[name], flush=True)
            if self.file:
                atomic.write_text(
                    self.file, json.dumps({"settings": self.settings, "accuracies": self.known}, indent=2) + "\n"
                )
        return self.known[name]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--budget", default="flops=0.5")
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--supernet_epochs", type=int, default=3)
    parser.add_argument("--variant", default="ours", help="variant of SP: ours or paper; AutoSlim takes its schedule")
    parser.add_argument("--scratch_epochs", type=int, default=2)
    parser.add_argument("--scratch_seeds", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="float32", help="precision of all trainings: float32 or bf16")
    parser.add_argument("--channels_last", action="store_true", help="memory layout of all trainings")
    parser.add_argument("--scratch", type=Path, help="file for the accuracies from scratch")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def training_config(arguments: argparse.Namespace) -> TrainConfig:
    """Return the settings of training from scratch."""
    return TrainConfig(
        epochs=arguments.scratch_epochs,
        batch_size=arguments.batch_size,
        lr=0.1,
        schedule="cosine",
        precision=arguments.precision,
        channels_last=arguments.channels_last,
    )


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Draw networks, train them and both methods, and return a row for each network."""
    data = load_data(arguments.data)
    model = create(arguments.model, num_classes=data.num_classes, in_channels=data.shape[0])
    load_weights(model, arguments.weights)
    placement = Placement(torch.device("cpu"), arguments.precision, arguments.channels_last)
    options = (model.eval(), data, placement, arguments.budget, arguments.supernet_epochs, arguments.batch_size)
    sp, task = prepare(SP, *options, variant=arguments.variant)
    masks = draw(sp, task, arguments.networks, arguments.seed)
    settings = {
        "model": arguments.model,
        "data": describe(data, arguments.data),
        "training": dataclasses.asdict(training_config(arguments)),
    }
    known = FromScratch(arguments.scratch, settings)
    seeds = [[known.accuracy(task, mask, data, seed) for mask in masks] for seed in range(arguments.scratch_seeds)]
    run_training(sp, task, data, placement)
    assert task.data is not None
    images, labels = task.data.held_out_batch(arguments.images)
    losses, scales = distances(sp, masks, images)
    slim, slim_task = prepare(AutoSlim, *options, schedule=sp.config.schedule)
    run_training(slim, slim_task, data, placement)
    shared = shared_scores(slim, masks, images, labels)
    rows: list[dict[str, Any]] = []
    for mask, stages, (accuracy, entropy), scratch in zip(masks, losses, shared, zip(*seeds, strict=True), strict=True):
        row = {
            "widths": widths_of(task, mask),
            "flops_ratio": float(task.budget.cost(task.graph, mask) / task.budget.cost(task.graph)),
            "sp_loss": sum(stages),
            "sp_losses": stages,
            "sp_relative": sum(loss / scale for loss, scale in zip(stages, scales, strict=True)),
            "autoslim_accuracy": accuracy,
            "autoslim_loss": entropy,
            "from_scratch": scratch,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def correlate(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the rank correlations of the proxies with accuracies from scratch, and of the first two seeds."""
    truth = [sum(row["from_scratch"]) / len(row["from_scratch"]) for row in rows]
    correlations = {
        "sp": spearmanr([-row["sp_loss"] for row in rows], truth),
        "sp_relative": spearmanr([-row["sp_relative"] for row in rows], truth),
        "autoslim": spearmanr([row["autoslim_accuracy"] for row in rows], truth),
        "autoslim_loss": spearmanr([-row["autoslim_loss"] for row in rows], truth),
    }
    if len(rows[0]["from_scratch"]) > 1:  # how well one training of these networks predicts another one
        correlations["seeds"] = spearmanr(*([row["from_scratch"][seed] for row in rows] for seed in (0, 1)))
    return {name: {"rho": float(c.statistic), "p": float(c.pvalue)} for name, c in correlations.items()}


def main() -> None:
    """Run the experiment."""
    arguments = parse_arguments()
    rows = measure(arguments)
    correlations = correlate(rows)
    print(json.dumps(correlations, indent=2))
    if arguments.json:
        paths = ("data", "weights", "scratch", "json")
        document = {
            "machine": machine(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "data": arguments.data.partition(":")[0],
            "settings": {name: value for name, value in vars(arguments).items() if name not in paths},
            "training": dataclasses.asdict(training_config(arguments)),
            "networks": rows,
            "spearman": correlations,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
