"""Rank correlations of SP's proxies, and of AutoSlim's, with accuracies from scratch.

    python bench/proxies.py --data cifar10:FOLDER --json proxies.json --precision bf16 --channels_last

Random networks of each budget, drawn like the first ones of SP's search, are trained from scratch with several seeds. A
super-net of SP gives every proxy of each network (``fastprune.methods.sp.proxies``), one of AutoSlim its accuracy and
cross-entropy. The program prints Spearman's ρ of each proxy with the mean accuracy, for each budget and over all, and
the mean ρ of two seeds, above which no proxy can be expected to get far.

Every number is written at once, super-nets are checkpointed in ``proxies-supernets/``; a program that is started again
with the same file goes on where it was. ``--share 1/2`` and ``--share 2/2`` divide the work between two processes that
write to one file.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from ranking import BAND, TrainingOnly, describe, draw, prepare, shared_scores
from scipy.stats import spearmanr
from torch import Tensor

from fastprune.data import load_data
from fastprune.engine import LoopOptions, Placement, RunDirectory, TrainConfig, evaluate, run_phases, train
from fastprune.host import atomic
from fastprune.host.machine import machine
from fastprune.methods.contract import Task
from fastprune.methods.sp.autoslim import AutoSlim
from fastprune.methods.sp.proxies import measure_proxies
from fastprune.methods.sp.sp import SP, variance
from fastprune.methods.sp.widths import first_units
from fastprune.models import create, load_weights
from fastprune.surgery import apply

Document = dict[str, Any]
SUPERNETS = {"sp": SP, "autoslim": AutoSlim}


class Experiment:
    """The networks, their proxies and accuracies as far as they are known.

    Args:
        arguments: the arguments of the command line.

    Raises:
        ValueError: if the file holds numbers of other settings.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.path = arguments, Path(arguments.json)
        self.placement = Placement(torch.device(arguments.device), arguments.precision, arguments.channels_last)
        self.data = load_data(arguments.data).to(self.placement.device)
        self.training = TrainConfig(
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            schedule="cosine",
            lr=0.1,
            weight_decay=5e-4,
            precision=arguments.precision,
            channels_last=arguments.channels_last,
            evaluate_every=0,
        )
        torch.manual_seed(0)
        self.model = create(arguments.model, num_classes=self.data.num_classes, in_channels=self.data.shape[0]).eval()
        if arguments.weights:
            load_weights(self.model, arguments.weights)
        left_out = {"data", "json", "weights", "share", "device"}
        settings = {name: value for name, value in vars(arguments).items() if name not in left_out}
        settings |= {"data": describe(self.data, arguments.data), "weights": bool(arguments.weights)}
        self.document = self.begin(json.loads(json.dumps(settings)))

    def begin(self, settings: dict[str, Any]) -> Document:
        """Return the document in the file, or begin it with networks drawn at random."""
        with self.locked():
            if self.path.exists():
                known: Document = json.loads(self.path.read_text(encoding="utf-8"))
                if known["settings"] != settings:
                    raise ValueError(f"json {self.path}: has settings {known['settings']}; this run has {settings}")
                return known
            networks = []
            for budget in settings["budgets"]:
                method, task = self.prepare(SP, budget)
                full = float(task.budget.cost(task.graph))
                for mask in draw(method, task, settings["networks"], settings["seed"]):
                    kept = [int(mask[group.units].sum()) for group in task.graph.groups]
                    ratio = float(task.budget.cost(task.graph, mask)) / full
                    networks.append({"budget": budget, "kept": kept, "ratio": ratio, "proxies": {}, "accuracies": {}})
            where = machine(self.placement.device)
            threads = torch.get_num_threads()
            begun = {"machine": where, "threads": threads, "torch": torch.__version__, "settings": settings}
            document = {**begun, "networks": networks, "supernets": {}}
            atomic.write_text(self.path, json.dumps(document, indent=1) + "\n")
            return document

    def locked(self) -> Lock:
        """Return the lock of the file, which the processes of a shared experiment take in turns."""
        return Lock(self.path.with_suffix(".lock"))

    def add(self, change: Callable[[Document], None]) -> None:
        """Change the document in the file, with what other processes have added since."""
        with self.locked():
            self.document = json.loads(self.path.read_text(encoding="utf-8"))
            change(self.document)
            atomic.write_text(self.path, json.dumps(self.document, indent=1) + "\n")

    def prepare(self, kind: type[Any], budget: str) -> tuple[Any, Task]:
        """Set up a method on a copy of the model."""
        arguments = self.arguments
        epochs, batch = arguments.supernet_epochs, arguments.supernet_batch_size
        return prepare(kind, self.model, self.data, self.placement, budget, epochs, batch)

    def mine(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield this process's part of some work, with its numbers."""
        part, parts = map(int, self.arguments.share.split("/"))
        for number, item in enumerate(items):
            if number % parts == part - 1:
                yield number, item

    # --- proxies ------------------------------------------------------------------------------------------------------

    def measure(self, name: str) -> None:
        """Train a super-net and measure its proxies of all networks."""
        if name in self.document["supernets"]:
            return
        method, task = self.prepare(SUPERNETS[name], self.arguments.budgets[0])
        folder = self.path.with_name(f"{self.path.stem}-supernets") / name
        settings = {"supernet": name, **self.document["settings"]}
        run = RunDirectory.open(folder) if folder.exists() else RunDirectory.create(folder, settings)
        trained = run_phases(
            TrainingOnly(method), task, self.data, run=run, resume=True, placement=self.placement,
            options=LoopOptions(checkpoint_epochs=1),
        )  # fmt: skip
        assert task.data is not None
        images, targets = task.data.held_out_batch(self.arguments.images)
        masks = [self.mask(task, row["kept"]) for row in self.document["networks"]]
        facts: dict[str, Any] = {"trained": trained}
        if name == "sp":
            found = measure_proxies(method.net, sum(method.groups, ()), masks, images, targets, task.objective)
            with torch.no_grad():
                facts["variances"] = [float(variance(y)) for y in method.net.features(images)[1:]]
            for row in found:
                for kind in ("mse", "mse_trained"):
                    pairs = zip(row[kind], facts["variances"], strict=True)
                    row[f"{kind}_relative"] = [loss / scale for loss, scale in pairs]
        else:
            scores = shared_scores(method, masks, images, targets)
            found = [{"autoslim": [entropy], "autoslim_error": [1 - accuracy]} for accuracy, entropy in scores]

        def change(document: Document) -> None:
            document["supernets"][name] = facts
            for row, proxies in zip(document["networks"], found, strict=True):
                row["proxies"] |= proxies

        self.add(change)
        print(name, {key: round(value, 4) for key, value in trained.items()}, flush=True)

    def mask(self, task: Task, kept: Sequence[int]) -> Tensor:
        """Return the mask [U] that keeps so many units of each group."""
        return first_units(task.graph, range(len(kept)), kept)

    # --- accuracies ---------------------------------------------------------------------------------------------------

    def train(self, number: int, seed: int, task: Task) -> None:
        """Train one network from random weights with one seed."""
        row = self.document["networks"][number]
        if str(seed) in row["accuracies"]:
            return
        torch.manual_seed(seed)
        fresh = create(self.arguments.model, num_classes=self.data.num_classes, in_channels=self.data.shape[0])
        compact = apply(task.graph.plan(self.mask(task, row["kept"])), fresh, check=False)
        train(compact, self.data, self.training, seed=seed, device=self.placement.device)
        accuracy = evaluate(compact, self.data, placement=self.placement)["accuracy"]
        self.add(lambda document: document["networks"][number]["accuracies"].update({str(seed): accuracy}))
        print(f"{row['budget']} network {number} seed {seed} accuracy {accuracy:.4f}", flush=True)


class Lock:
    """A lock between processes, held in a ``with`` block.

    Args:
        path: the lock's file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self.file.close()


def correlate(networks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return Spearman's ρ of each proxy with the mean accuracy, and the mean ρ of two seeds ("seeds").

    Networks count that were trained with as many seeds as any; "cost" is the proxy of somebody who only knows the cost.
    """
    most = max((len(row["accuracies"]) for row in networks), default=0)
    rows = [row for row in networks if row["accuracies"] and len(row["accuracies"]) == most]
    if len(rows) < 3:
        return {}
    truth = [statistics.mean(row["accuracies"].values()) for row in rows]
    scores = {name: [-sum(row["proxies"][name]) for row in rows] for name in rows[0]["proxies"]}
    scores["cost"] = [row["ratio"] for row in rows]
    found = {name: rho(values, truth) for name, values in scores.items()}
    pairs = list(combinations(sorted(rows[0]["accuracies"]), 2))
    if pairs:
        found["seeds"] = statistics.mean(rho(*([row["accuracies"][s] for row in rows] for s in pair)) for pair in pairs)
    return found


def rho(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's ρ; 0 where one side does not vary."""
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0
    return float(spearmanr(first, second).statistic)


def table(document: Document) -> Iterator[str]:
    """Yield the lines of a table: a row for each proxy, a column for each budget, and one for all of them."""
    budgets = list(document["settings"]["budgets"])
    rows = document["networks"]
    columns = {budget: correlate([row for row in rows if row["budget"] == budget]) for budget in budgets}
    columns["all"] = correlate(rows)
    yield f"| ρ with the accuracy from scratch | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        cells = [f"{column[name]:.2f}" if name in column else "–" for column in columns.values()]
        yield f"| {name} | {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", help="what super-nets start from; without them they start random, as in the paper")
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", default=["flops=0.5", "flops=0.35"])
    parser.add_argument("--networks", type=int, default=12, help=f"for each budget, within {BAND:.0%} below it")
    parser.add_argument("--seeds", type=int, default=3, help="trainings from scratch of each network")
    parser.add_argument("--epochs", type=int, default=15, help="of each training from scratch")
    parser.add_argument("--batch_size", type=int, default=128, help="of each training from scratch")
    parser.add_argument("--supernet_epochs", type=int, default=15)
    parser.add_argument("--supernet_batch_size", type=int, default=128)
    parser.add_argument("--images", type=int, default=2048, help="held-out images that proxies are measured on")
    parser.add_argument("--seed", type=int, default=0, help="of the networks that are drawn")
    parser.add_argument("--precision", default="float32", help="float32 or bf16")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--share", default="1/1", help="the part of the work for this process: 1/2, 2/2")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then print the table."""
    experiment = Experiment(parse_arguments())
    for _, name in experiment.mine(list(SUPERNETS)):
        experiment.measure(name)
    _, task = experiment.prepare(SP, experiment.arguments.budgets[0])
    numbers = range(len(experiment.document["networks"]))
    work = [(number, seed) for seed in range(experiment.arguments.seeds) for number in numbers]
    for _, (number, seed) in experiment.mine(work):
        experiment.train(number, seed, task)
    experiment.add(lambda document: None)  # what other processes have found
    print("\n".join(table(experiment.document)))


if __name__ == "__main__":
    main()
