"""Prune every group of many networks by half, exactly or inexactly, and beside it with a peer.

OMP_NUM_THREADS=1 python bench/prune_zoo.py --peer --json coverage.json --markdown docs/coverage.md
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import zoo
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastprune.bench.settings import check_folder
from fastprune.graph import ChannelGraph, trace
from fastprune.host import atomic
from fastprune.host.machine import machine
from fastprune.surgery import cut, verify
from fastprune.surgery.rewritten import RewrittenNetwork
from fastprune.surgery.slicing import copy_model

PEER = "torch-pruning"
ONE = "one"  # the first argument of a process that prunes one network


@dataclass(frozen=True)
class Settings:
    """The options of the program.

    Args:
        only: names or patterns of networks; () = all.
        workers: number of networks at a time, each in a process of its own.
        limit: greatest time for one network, in seconds.
        inexact: whether channels also leave norms and statistics over channels.
        attention: whether channels leave norms over channels exactly, and whole heads leave attention.
        peer: whether the peer prunes the same networks.
        json: file for the numbers.
        resume: whether to keep the rows in ``json`` from the same machine and versions, except failures.
        markdown: file for the table.
    """

    only: tuple[str, ...] = ()
    workers: int = 1
    limit: float = 300.0
    inexact: bool = False
    attention: bool = False
    peer: bool = False
    json: str | None = None
    resume: bool = False
    markdown: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 1 or not self.limit > 0:
            raise ValueError(f"workers {self.workers}, limit {self.limit:g}: both must be above 0")
        check_folder("json", self.json)
        check_folder("markdown", self.markdown)
        if self.resume and self.json is None:
            raise ValueError("resume: needs --json, the file to resume")
        if self.inexact and self.attention:
            raise ValueError("inexact, attention: two ways through a norm; choose one")
        if self.peer:
            try:
                version(PEER)
            except PackageNotFoundError:
                raise ValueError(f"peer: {PEER} is not installed; install it or drop --peer") from None


def coverage(settings: Settings) -> dict[str, Any]:
    """Prune the networks, print a line for each, and write the files of the settings."""
    chosen = choose_names(settings.only) if settings.only else tuple(zoo.names())
    document: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "workers": settings.workers,
        "inexact": settings.inexact,
        **({"attention": True} if settings.attention else {}),
        **({"only": list(settings.only)} if settings.only else {}),
        "torch": torch.__version__,
        **{package: version(package) for package in ("torchvision", "timm", *([PEER] if settings.peer else []))},
        "networks": [],
    }
    console = Console(highlight=False)
    for row in rows(chosen, settings, kept_rows(document, settings)):
        document["networks"].append(row)
        console.print(line(row), markup=False)
        if settings.json is not None:  # after each, so that a failure does not lose minutes of work
            atomic.write_text(Path(settings.json), json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    console.print(summary(document), markup=False)
    if settings.markdown is not None:
        atomic.write_text(Path(settings.markdown), markdown(document))
    return document


def choose_names(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the list that match a pattern."""
    chosen = tuple(name for name in zoo.names() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    if not chosen:
        raise ValueError(f"only {' '.join(patterns)}: matches no network of the list in zoo.py")
    return chosen


def kept_rows(document: dict[str, Any], settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the rows to keep of an earlier run, by network: those in which we did not fail.

    Raises:
        ValueError: if the file comes from another machine, other versions or other settings.
    """
    if not settings.resume or not Path(str(settings.json)).exists():
        return {}
    earlier = json.loads(Path(str(settings.json)).read_text(encoding="utf-8"))
    for name, value in document.items():
        if name != "networks" and earlier.get(name) != value:
            raise ValueError(f"resume: {settings.json!r} has {name} {earlier.get(name)!r}, this run {value!r}")
    return {row["name"]: row for row in earlier["networks"] if "error" not in row["ours"]}


def rows(names: Sequence[str], settings: Settings, kept: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the row of each network; each has a process of its own, so that a crash ends no other."""

    def both(name: str) -> dict[str, Any]:
        if name in kept:
            return kept[name]
        who = "inexact" if settings.inexact else "attention" if settings.attention else "ours"
        row = {"name": name, "ours": run_process(who, name, settings.limit)}
        return row | ({"peer": run_process("peer", name, settings.limit)} if settings.peer else {})

    with ThreadPoolExecutor(settings.workers) as pool:
        yield from pool.map(both, names)


def run_process(who: str, name: str, limit: float) -> dict[str, Any]:
    """Prune one network in a process of its own and return its result."""
    command = [sys.executable, "-W", "ignore", __file__, ONE, who, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:g} s"}
    documents = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if not documents:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": last[0]}
    result: dict[str, Any] = json.loads(documents[-1])
    return result


def prune_by_half(name: str, *, exact: bool = True, attention: bool = False) -> dict[str, Any]:
    """Trace, prune every group by a random half of its units, and verify in float64.

    Args:
        name: the network.
        exact: see ``trace``.
        attention: ``replace_norms`` and ``heads`` of ``trace``.
    """
    model, size = zoo.create(name)
    begin = time.perf_counter()
    graph = trace(model, torch.zeros(1, *size), exact=exact, replace_norms=attention, heads=attention)
    mask = random_half(graph)
    full, left = graph.cost(), graph.cost(mask)
    result: dict[str, Any] = {
        "groups": len(graph.groups),
        "units": graph.num_units,
        "macs": int(full.macs),
        "macs_left": float(left.macs / full.macs),
        "prunable": prunable_share(graph),
        "inexact": list(graph.inexact),
        "layers": len({layer.name for layer in graph.layers} | {name for name, _ in graph.unprunable}),
        "kept": len(graph.unprunable),
        "reasons": dict(Counter(reason.partition(" in ")[0] for _, reason in graph.unprunable).most_common(3)),
    }
    if graph.groups:
        plan = graph.plan(mask)
        done = cut(plan, model, graph.traced)
        result["seconds"] = time.perf_counter() - begin
        result["rewritten"] = isinstance(done.model, RewrittenNetwork)
        result["difference"] = verify(plan, model, done.model, dtype=torch.float64) if plan.exact else done.difference
        counted = macs(done.model.float(), size), sum(p.numel() for p in done.model.parameters())
        result["cost_is_counted"] = counted[1] == plan.params[1] and (
            counted[0] == plan.macs[1] or macs(model, size) != plan.macs[0]  # torch also counts attention
        )
    else:
        result["seconds"] = time.perf_counter() - begin
    return result


def random_half(graph: ChannelGraph) -> Tensor:
    """Return a mask that keeps a random half of each group's units, at least one."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(graph.num_units)
    for group in graph.groups:
        order = torch.randperm(group.size, generator=generator)
        mask[group.start + order[: max(1, group.size // 2)]] = 1
    return mask


def prunable_share(graph: ChannelGraph) -> float:
    """Return the share of MACs that goes if every group keeps one unit."""
    least = graph.cost_model.of_widths(torch.ones(len(graph.groups), dtype=torch.float64))
    return float(1 - least.macs / graph.cost().macs)


def macs(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Return the multiply-accumulates of one image by torch's count."""
    model = copy_model(model).requires_grad_(False)  # torch's counter fails on modules that get a parameter as input
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, *size))
    return int(counter.get_total_flops() // 4)


def prune_by_peer(name: str) -> dict[str, Any]:
    """Prune every group but the last layers' by half with the peer, as in its documentation."""
    import torch_pruning

    model, size = zoo.create(name)
    full = macs(model, size)
    begin = time.perf_counter()
    widths = {m: m.weight.shape[0] for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    heads = [m for m, width in widths.items() if width == 1000]
    example = torch.zeros(1, *size)
    try:
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, example, importance=torch_pruning.importance.MagnitudeImportance(p=1), pruning_ratio=0.5,
            ignored_layers=heads,
        )  # fmt: skip
        pruner.step()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "macs_left": macs(model, size) / full}
    except Exception as error:  # any error is a result
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}


def line(row: dict[str, Any]) -> str:
    """Return one network's line for the terminal."""
    ours = row["ours"]
    if "error" in ours:
        text = f"failed: {ours['error']}"
    else:
        text = (
            f"{ours['groups']} groups, {ours['units']} units, {ours['macs_left']:.2f} of MACs left "
            f"({ours['prunable']:.1%} prunable), "
            f"{ours['seconds']:.1f} s, difference {ours.get('difference', 0.0):.0e}"
        )
    peer = row.get("peer")
    if peer is not None:
        text += f"; {PEER}: " + (peer.get("error") or f"{peer['macs_left']:.2f} left, {peer['seconds']:.1f} s")
    return f"{row['name']}: {text}"


def outcome(ours: dict[str, Any]) -> str:
    """Return the outcome for one network in a few words."""
    if "error" in ours:
        return "failed"
    if not ours["groups"]:
        return "without a prunable channel"
    if not ours["cost_is_counted"] or (ours["difference"] > 1e-9 and not ours["inexact"]):
        return "wrong"
    return "pruned inexactly" if ours["inexact"] else "pruned exactly"


def summary(document: dict[str, Any]) -> str:
    """Return the number of networks with each outcome, by source."""
    parts = []
    for kind in dict.fromkeys(row["name"].partition(":")[0] for row in document["networks"]):
        some = [row for row in document["networks"] if row["name"].startswith(f"{kind}:")]
        counts = Counter(outcome(row["ours"]) for row in some).most_common()
        text = f"{kind}: of {len(some)} networks " + ", ".join(f"{number} {what}" for what, number in counts)
        if PEER in document:
            text += f"; {sum('error' not in row['peer'] for row in some)} by {PEER} without an error"
        parts.append(text)
    return "\n".join(parts)


EXPLANATION = """\
Every group of channels loses a random half of its units. The compact network is compared with the masked one on random
inputs in float64 (`difference`, relative), and its MACs and parameters are compared with the predicted ones. `s` is the
time to trace, plan, cut and verify. `runs` says whether the model's own code runs the compact network or its graph had
to be rewritten. `layers kept` counts convolutions and linear layers whose output channels always stay, with the
operators that are the most frequent reasons. `prunable` is the share of MACs that would go if every group kept one unit
only."""
INEXACT = """\
With `exact=False` channels also leave norms and statistics over channels. For networks where they do, `difference` is
what the removal changed beyond closing channels. It is a measurement, in float32, and not an error."""

ATTENTION = """\
With `replace_norms=True` norms over channels count those that have left as zeros, so that channels leave in front of
them, exactly; with `heads=True` whole heads of attention leave."""


def markdown(document: dict[str, Any]) -> str:
    """Return the table as a page."""
    peer = PEER in document
    versions = ", ".join(
        f"{name} {document[name]}" for name in ("torch", "torchvision", "timm", PEER) if name in document
    )
    command = f"OMP_NUM_THREADS={document['threads']} python bench/prune_zoo.py --workers {document['workers']}"
    inexact, attention = document["inexact"], document.get("attention", False)
    command += f"{' --inexact' if inexact else ' --attention' if attention else ''}{' --peer' if peer else ''}"
    if "only" in document:
        command += " --only " + " ".join(f"'{name}'" for name in document["only"])
    command += f" --markdown docs/coverage{'-inexact' if inexact else '-attention' if attention else ''}.md"
    head = ["network", "groups", "units", "layers kept", "MACs left", "prunable", "s", "difference", "runs"]
    lines = [
        f"# Which networks can be pruned{' inexactly' if inexact else ' in norms and heads' if attention else ''}",
        "",
        f"    {command}",
        "",
        f"{versions}; {document['machine']}.",
        "",
        *EXPLANATION.splitlines(),
        "",
        *([*INEXACT.splitlines(), ""] if inexact else [*ATTENTION.splitlines(), ""] if attention else []),
        *summary(document).replace("\n", "\n\n").splitlines(),
        "",
        "| " + " | ".join(head + ([f"{PEER}: MACs left", "s"] if peer else [])) + " |",
        "|" + "---|" * (len(head) + 2 * peer),
    ]
    for row in document["networks"]:
        cells = [row["name"], *our_cells(row["ours"]), *(peer_cells(row["peer"]) if peer else [])]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def our_cells(ours: dict[str, Any]) -> list[str]:
    """Return our cells of one network's row."""
    if "error" in ours:
        return ["", "", "", "", "", "", "", f"failed: {ours['error']}"]
    reasons = ", ".join(ours["reasons"])
    return [
        f"{ours['groups']}", f"{ours['units']:,}", f"{ours['kept']} of {ours['layers']}: {reasons}",
        f"{ours['macs_left']:.2f}", f"{100 * ours['prunable']:.1f} %", f"{ours['seconds']:.1f}",
        f"{ours['difference']:.0e}" if "difference" in ours else "",
        {True: "rewritten", False: "own code", None: ""}[ours.get("rewritten")],
    ]  # fmt: skip


def peer_cells(theirs: dict[str, Any]) -> list[str]:
    """Return the peer's cells of one network's row."""
    failed = theirs.get("error", "").partition(":")[0]
    return [failed, ""] if failed else [f"{theirs['macs_left']:.2f}", f"{theirs['seconds']:.1f}"]


def prune_one(who: str, name: str) -> None:
    """Print one network's result as a line of JSON."""
    try:
        if who == "peer":
            result = prune_by_peer(name)
        else:
            result = prune_by_half(name, exact=who != "inexact", attention=who == "attention")
    except Exception as error:  # a failure is a row of the table
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sys.stdout.write(json.dumps(result) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options and prune the networks."""
    parser = argparse.ArgumentParser(description="Prune many networks by half.")
    parser.add_argument("--only", nargs="+", default=(), help="names or patterns ('timm:res*'); default: all networks")
    parser.add_argument("--workers", type=int, default=1, help="number of networks at a time")
    parser.add_argument("--limit", type=float, default=300.0, help="greatest time for one network, in seconds")
    parser.add_argument("--inexact", action="store_true", help="also remove channels from norms and statistics")
    parser.add_argument("--attention", action="store_true", help="remove channels from norms exactly, and whole heads")
    parser.add_argument("--peer", action="store_true", help=f"also prune the networks with {PEER}")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the --json file, except failures")
    parser.add_argument("--markdown", help="file for the table")
    values = vars(parser.parse_args(arguments))
    try:
        coverage(Settings(**values | {"only": tuple(values["only"])}))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE]:
        prune_one(*sys.argv[2:])
    else:
        main()
