"""How long it takes to trace, plan, cut and verify a network, beside a peer's graph and pruning of the same."""

from __future__ import annotations

import fnmatch
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
from rich.console import Console

from fastprune.bench import zoo
from fastprune.bench.coverage import PEER, half, prune_by_peer
from fastprune.bench.settings import check_folder
from fastprune.graph import trace
from fastprune.host import atomic
from fastprune.host.machine import machine
from fastprune.options import SEVERAL, check, option
from fastprune.surgery import SurgeryError, verify
from fastprune.surgery.rewritten import RewrittenNetwork, rewritten
from fastprune.surgery.slicing import sliced

NETWORKS = tuple(
    f"torchvision:{name}"
    for name in (
        *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "densenet201", "vgg16", "efficientnet_b0"),
        *("inception_v3", "googlenet", "convnext_tiny", "regnet_y_400mf", "shufflenet_v2_x1_0"),
    )
)
STEPS = ("trace", "plan", "surgery", "verify")


@dataclass
class TraceBenchSettings:
    """Time tracing and surgery."""

    only: tuple[str, ...] = option((), "names or patterns ('timm:res*') from the list of coverage", flag=SEVERAL)
    rounds: int = option(3, "rounds, of which the median counts", minimum=1)
    json: str | None = option(None, "file to write the numbers to")

    def __post_init__(self) -> None:
        check(self)
        check_folder("json", self.json)


def bench_trace(settings: TraceBenchSettings) -> dict[str, Any]:
    """Time the networks, print a line for each, and write the file that is asked for."""
    chosen = NETWORKS if not settings.only else chosen_from(zoo.names(), settings.only)
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
    measured(chosen[0], 1, with_peer=with_peer)  # imports, and what torch does once
    for name in chosen:
        row = measured(name, settings.rounds, with_peer=with_peer)
        document["networks"].append(row)
        document["geometric_means"] = geometric_means(document["networks"])
        console.print(line(row), markup=False, soft_wrap=True)
        if settings.json is not None:  # after each: what took minutes is not lost where something fails
            atomic.write_text(Path(settings.json), json.dumps(document, indent=1) + "\n")
    for what, mean in document["geometric_means"].items():
        console.print(f"geometric mean, {what}: {mean:.2f} times as fast as {PEER}", markup=False)
    return document


def chosen_from(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The names that fit a pattern."""
    found = tuple(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    if not found:
        raise ValueError(f"only {' '.join(patterns)}: no network of the list has such a name")
    return found


def peer_version() -> str | None:
    """The peer's, None where it is not installed."""
    try:
        return version(PEER)
    except PackageNotFoundError:
        return None


def measured(name: str, rounds: int, *, with_peer: bool) -> dict[str, Any]:
    """Medians of one network, ours and the peer's in turns."""
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, Any]] = []
    for number in range(rounds):
        turns: list[Callable[[], None]] = [lambda: ours.append(ours_once(name))]
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


def ours_once(name: str) -> dict[str, float]:
    """Seconds of each step, every group pruned by half."""
    model, size = zoo.create(name)
    example = torch.zeros(1, *size)
    marks = [time.perf_counter()]
    graph = trace(model, example)
    marks.append(time.perf_counter())
    plan = graph.plan(half(graph))
    marks.append(time.perf_counter())
    compact = sliced(plan, model)
    marks.append(time.perf_counter())
    try:
        verify(plan, model, compact)
    except SurgeryError:  # the model's own code cannot run it: what was tried counts as verification
        tried = time.perf_counter()
        compact = rewritten(plan, model, compact, graph.traced)
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
    """Of the ratios of peer to ours, where the peer did not fail."""
    ratios = [row["ratios"] for row in rows if "ratios" in row]
    kinds = ratios[0] if ratios else ()
    return {kind: math.exp(math.fsum(math.log(found[kind]) for found in ratios) / len(ratios)) for kind in kinds}


def line(row: Mapping[str, Any]) -> str:
    """One network for the terminal."""
    text = ", ".join(f"{step} {seconds:.2f}" for step, seconds in row["seconds"].items()) + " s"
    if "peer_error" in row:
        return f"{row['name']}: {text}; {PEER} failed: {row['peer_error']}"
    if "ratios" in row:
        ratios = row["ratios"]
        text += f"; {PEER} {row['peer_seconds']:.2f} s, {ratios['in total']:.2f}x"
        text += f", {ratios['without verification']:.2f}x without verification"
    return f"{row['name']}: {text}"
