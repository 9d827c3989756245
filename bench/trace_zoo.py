"""Times to trace, plan, cut and verify networks, beside a peer's tracing and pruning of the same networks."""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import zoo
from prune_zoo import PEER, choose_names, prune_by_peer, random_half
from rich.console import Console

from fastprune.bench.settings import check_folder
from fastprune.graph import trace
from fastprune.host import atomic
from fastprune.host.machine import machine
from fastprune.surgery import SurgeryError, verify
from fastprune.surgery.rewritten import RewrittenNetwork, rewrite_network
from fastprune.surgery.slicing import slice_model

NETWORKS = tuple(
    f"torchvision:{name}"
    for name in (
        *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "densenet201", "vgg16", "efficientnet_b0"),
        *("inception_v3", "googlenet", "convnext_tiny", "regnet_y_400mf", "shufflenet_v2_x1_0"),
    )
)
STEPS = ("trace", "plan", "surgery", "verify")


@dataclass(frozen=True)
class Settings:
    """The options of the program.

    Args:
        only: names or patterns of networks; () = ``NETWORKS``.
        rounds: number of rounds; the median counts.
        json: file for the numbers.
    """

    only: tuple[str, ...] = ()
    rounds: int = 3
    json: str | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds {self.rounds}: must be at least 1")
        check_folder("json", self.json)


def time_networks(settings: Settings) -> dict[str, Any]:
    """Time the networks, print a line for each, and write the file of the settings."""
    chosen = choose_names(settings.only) if settings.only else NETWORKS
    document: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "rounds": settings.rounds,
        "torch": torch.__version__,
        PEER: peer_version(),
        "networks": [],
    }
    console = Console(highlight=False)
    with_peer = document[PEER] is not None
    measure(chosen[0], 1, with_peer=with_peer)  # warm-up: imports, and torch's first-time work
    for name in chosen:
        row = measure(name, settings.rounds, with_peer=with_peer)
        document["networks"].append(row)
        document["geometric_means"] = geometric_means(document["networks"])
        console.print(line(row), markup=False, soft_wrap=True)
        if settings.json is not None:  # after each, so that a failure does not lose minutes of work
            atomic.write_text(Path(settings.json), json.dumps(document, indent=1) + "\n")
    for what, mean in document["geometric_means"].items():
        console.print(f"geometric mean, {what}: {mean:.2f} times as fast as {PEER}", markup=False)
    return document


def peer_version() -> str | None:
    """Return the version of the peer, or None if it is not installed."""
    try:
        return version(PEER)
    except PackageNotFoundError:
        return None


def measure(name: str, rounds: int, *, with_peer: bool) -> dict[str, Any]:
    """Return the medians of one network; we and the peer take turns."""
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, Any]] = []
    for number in range(rounds):
        turns: list[Callable[[], None]] = [lambda: ours.append(time_steps(name))]
        if with_peer:
            turns.append(lambda: theirs.append(prune_by_peer(name)))
        for turn in turns[:: 1 if number % 2 == 0 else -1]:
            gc.collect()
            turn()
    row: dict[str, Any] = {"name": name}
    row["seconds"] = {step: statistics.median(times[step] for times in ours) for step in (*STEPS, "total")}
    failed = [result["error"] for result in theirs if "error" in result]
    if failed:
        row["peer_error"] = failed[0]
    elif theirs:
        row["peer_seconds"] = peer = statistics.median(result["seconds"] for result in theirs)
        unverified = row["seconds"]["total"] - row["seconds"]["verify"]
        row["ratios"] = {"in total": peer / row["seconds"]["total"], "without verification": peer / unverified}
    return row


def time_steps(name: str) -> dict[str, float]:
    """Prune every group of a network by half and return the seconds of each step."""
    model, size = zoo.create(name)
    example = torch.zeros(1, *size)
    marks = [time.perf_counter()]
    graph = trace(model, example)
    marks.append(time.perf_counter())
    plan = graph.plan(random_half(graph))
    marks.append(time.perf_counter())
    compact = slice_model(plan, model)
    marks.append(time.perf_counter())
    try:
        verify(plan, model, compact)
    except SurgeryError:  # the model's own code cannot run the compact network; this attempt counts as verification
        tried = time.perf_counter()
        compact = rewrite_network(plan, model, compact, graph.traced)
        assert isinstance(compact, RewrittenNetwork)
        rewriting = time.perf_counter() - tried
        verify(plan, model, compact)
    else:
        rewriting = 0.0
    marks.append(time.perf_counter())
    steps = {step: end - begin for step, begin, end in zip(STEPS, marks[:-1], marks[1:], strict=True)}
    steps["surgery"] += rewriting
    steps["verify"] -= rewriting
    return steps | {"total": marks[-1] - marks[0]}


def geometric_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the means of the ratios peer to ours over networks on which the peer did not fail."""
    ratios = [row["ratios"] for row in rows if "ratios" in row]
    kinds = ratios[0] if ratios else ()
    return {kind: math.exp(math.fsum(math.log(ratio[kind]) for ratio in ratios) / len(ratios)) for kind in kinds}


def line(row: Mapping[str, Any]) -> str:
    """Return one network's line for the terminal."""
    text = ", ".join(f"{step} {seconds:.2f}" for step, seconds in row["seconds"].items()) + " s"
    if "peer_error" in row:
        return f"{row['name']}: {text}; {PEER} failed: {row['peer_error']}"
    if "ratios" in row:
        ratios = row["ratios"]
        text += f"; {PEER} {row['peer_seconds']:.2f} s, {ratios['in total']:.2f}x"
        text += f", {ratios['without verification']:.2f}x without verification"
    return f"{row['name']}: {text}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options and time the networks."""
    parser = argparse.ArgumentParser(description="Time tracing and surgery.")
    parser.add_argument("--only", nargs="+", default=(), help="names or patterns ('timm:res*') of the list in zoo.py")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the median counts")
    parser.add_argument("--json", help="file for the numbers")
    values = vars(parser.parse_args(arguments))
    try:
        time_networks(Settings(**values | {"only": tuple(values["only"])}))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
