"""Accuracy before any training: criteria times compensations, on the whole test set.

    python bench/recovery.py --model resnet56 --weights W.safetensors --data cifar10:FOLDER --json recovery.json

A method is written as ``l1``, or ``l1:ranking=global`` with options. ``peer:taylor`` is torch-pruning's criterion of
this name under its local ranking, on the same channels; its ratio is the smallest that meets the budget. Every number
is written at once; a program that is started again with the same file goes on where it was, with ``--runs`` also in
the middle of a search, whose seconds are then null.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import fastprune as fp
from fastprune.data import load_data
from fastprune.data.data import Data
from fastprune.engine import Placement, evaluate
from fastprune.graph import ChannelGraph
from fastprune.graph.interior import interior_units
from fastprune.graph.model_state import in_eval_mode
from fastprune.host import atomic
from fastprune.host.machine import machine
from fastprune.models import create
from fastprune.planning.budget import Budget
from fastprune.recovery import calibration_inputs, compensate_weights
from fastprune.surgery import apply

METHODS = (
    *("random", "l1", "l1:ranking=global", "l2", "group_norm", "bn_scale", "lamp", "fpgm", "taylor", "fisher", "obs"),
    *("activation", "wanda", "hrank", "chip"),
    *("peer:l1", "peer:group_norm", "peer:taylor", "peer:bn_scale", "peer:lamp"),
)
HOWS = ("none", "bn", "one_pass", "sequential")


class Experiment:
    """The network and its data, and what was measured so far.

    Args:
        arguments: the arguments of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data: Data = load_data(arguments.data)
        self.model = create(arguments.model, weights=arguments.weights).eval()
        images, _ = next(iter(self.data.batches("train", 2, seed=0)))
        self.example = images[:1]
        self.graph = fp.trace(self.model, self.example)
        self.path: Path = arguments.json
        self.document: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {
            "machine": machine(torch.device("cpu")), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "model": arguments.model, "data": arguments.data.partition(":")[0], "images": arguments.images,
            "baseline": self.accuracy(self.model), "rows": [],
        }  # fmt: skip
        self.images: int = self.document["images"]
        self.runs: Path | None = arguments.runs
        self.network_and_data = f"{arguments.model} {arguments.data}"

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test set."""
        return evaluate(model, self.data, placement=Placement())["accuracy"]

    def has(self, **key: Any) -> bool:
        """Return whether a number was measured already."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.document["rows"])

    def add(self, **row: Any) -> None:
        """Keep a number."""
        self.document["rows"].append(row)
        atomic.write_text(self.path, json.dumps(self.document, indent=1) + "\n")
        print(" ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                       for name, value in row.items()), flush=True)  # fmt: skip

    def name_of(self, search: str) -> str:
        """Return the name of a search's folder; no other search, network or data set has it."""
        checksum = zlib.crc32(f"{self.network_and_data} {search}".encode())
        return re.sub(r"[^\w.]+", "-", search) + f"-{checksum:08x}"

    def run(self, method: str, budget: float, hows: list[str], seed: int) -> None:
        """Measure one method at one budget under all compensations."""
        key = {"method": method, "budget": budget, "seed": seed}
        missing = [how for how in hows if not self.has(**key, how=how)]
        if not missing:
            return
        if method.startswith("peer:"):
            if "none" in missing:
                model, ratio = prune_by_peer(
                    self.model, self.graph, self.data, self.example, method[5:], budget, self.images, seed
                )
                self.add(**key, how="none", macs=ratio, seconds=0.0, accuracy=self.accuracy(model))
            return
        name, _, options = method.partition(":")
        began = time.perf_counter()
        pairs = (option.partition("=") for option in options.split(",") if option)
        given = {option: yaml.safe_load(value) for option, _, value in pairs}
        groups = {} if name == "uniform" else {"groups": "interior"}
        out = None if self.runs is None else self.runs / self.name_of(f"{method} {budget} {seed}")
        resume = out is not None and out.exists()
        result = fp.prune(
            self.model,
            self.example,
            method=name,
            budget=budget,
            data=self.data,
            seed=seed,
            compensate="none",
            out=out,
            resume=resume,
            **groups,
            **given,
        )
        macs = float(self.graph.cost(result.plan.mask).macs / self.graph.cost().macs)
        searched = None if resume else time.perf_counter() - began
        batches = calibration_inputs(self.graph, self.model, self.data, self.images, seed=seed)
        for how in missing:
            began = time.perf_counter()
            model = result.model
            if how != "none":
                model = apply(result.plan, compensate_weights(self.graph, self.model, result.plan, batches, how)[0])
            seconds = searched if how == "none" else time.perf_counter() - began
            self.add(**key, how=how, macs=macs, seconds=seconds, accuracy=self.accuracy(model))


def prune_by_peer(
    model: nn.Module,
    graph: ChannelGraph,
    data: Data,
    example: Tensor,
    name: str,
    budget: float,
    images: int,
    seed: int,
) -> tuple[nn.Module, float]:
    """Prune the interior groups by torch-pruning; return the network and its part of the MACs."""
    import torch_pruning as tp

    importances = {
        "l1": lambda: tp.importance.MagnitudeImportance(p=1, group_reduction="first"),
        "group_norm": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "bn_scale": tp.importance.BNScaleImportance,
        "lamp": lambda: tp.importance.LAMPImportance(p=2),
    }
    inside = interior_units(graph)
    prunable = {
        piece.tensor.removesuffix(".weight")
        for piece in graph.slices
        if piece.role in {"out", "depthwise"} and bool(((piece.units >= 0) & inside[piece.units]).all())
    }
    limit = Budget.of(budget).limit(graph)
    total = float(graph.cost().macs)

    def pruned(percent: int) -> tuple[nn.Module, float]:
        network = copy.deepcopy(model).eval()
        kept = [m for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and n not in prunable]
        pruner = tp.pruner.BasePruner(
            network, example, importance=importances[name](), pruning_ratio=percent / 100, ignored_layers=kept
        )
        if name == "taylor":
            taylor_gradients(network, data, images, seed)
        pruner.step()
        return network.eval(), float(fp.trace(network, example).cost().macs)

    percent = bisect_left(range(100), True, key=lambda percent: pruned(percent)[1] <= limit)
    if percent == 100:
        raise ValueError(f"torch-pruning: no ratio meets flops={budget}")
    network, macs = pruned(percent)
    return network, macs / total


def taylor_gradients(network: nn.Module, data: Data, images: int, seed: int) -> None:
    """Leave the gradient of the mean loss in the weights."""
    with in_eval_mode(network):
        for inputs, labels in data.batches("train", 64, seed=seed, samples=images):
            torch.nn.functional.cross_entropy(network(inputs), labels).backward()  # a sum; its scale does not matter


def table(document: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table, one per budget and method: mean accuracies of the seeds, in per cent."""
    rows = document["rows"]
    hows = [how for how in HOWS if any(row["how"] == how for row in rows)]
    yield "| budget | method | MACs | " + " | ".join("raw" if how == "none" else how for how in hows) + " |"
    yield "|---" * (3 + len(hows)) + "|"
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        for method in dict.fromkeys(row["method"] for row in rows if row["budget"] == budget):
            own = [row for row in rows if row["budget"] == budget and row["method"] == method]
            cells = [[100 * row["accuracy"] for row in own if row["how"] == how] for how in hows]
            macs = statistics.mean(row["macs"] for row in own)
            yield f"| {budget} | `{method}` | {macs:.3f} | " + " | ".join(map(describe, cells)) + " |"


def describe(values: list[float]) -> str:
    """Return the mean of some accuracies, and half of their range if there are several."""
    if not values:
        return "–"
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", help="without them the model is taken as it is built")
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35], help="fractions of the MACs")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--compensate", nargs="+", default=list(HOWS), choices=HOWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, help="folder for searches, which go on after an interruption")
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then print the table."""
    arguments = parse_arguments()
    experiment = Experiment(arguments)
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            for method in arguments.methods:
                experiment.run(method, budget, arguments.compensate, seed)
    print("\n".join(table(experiment.document)))


if __name__ == "__main__":
    main()
