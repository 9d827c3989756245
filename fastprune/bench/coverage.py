"""Which networks can be pruned: every group of each of a long list by half, exactly or not, and by a peer beside it."""

from __future__ import annotations

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
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastprune.bench import zoo
from fastprune.bench.settings import check_folder
from fastprune.graph import ChannelGraph, trace
from fastprune.host import atomic
from fastprune.host.machine import machine
from fastprune.options import SEVERAL, SWITCH, check, option
from fastprune.surgery import cut, verify
from fastprune.surgery.rewritten import RewrittenNetwork
from fastprune.surgery.slicing import copied

PEER = "torch-pruning"


@dataclass
class CoverageSettings:
    """Prune many networks by half."""

    only: tuple[str, ...] = option((), "names or patterns ('timm:res*') of networks; all without it", flag=SEVERAL)
    workers: int = option(1, "networks at a time, each in a process of its own", minimum=1)
    limit: float = option(300.0, "seconds that one network may take", above=0.0)
    inexact: bool = option(False, "let channels leave norms and statistics over channels, too", flag=SWITCH)
    peer: bool = option(False, f"prune the same networks by {PEER}, too", flag=SWITCH)
    json: str | None = option(None, "file to write the numbers to")
    resume: bool = option(
        False,
        "keep the results in the file of --json that the same machine and versions made; repeat failures",
        flag=SWITCH,
    )
    markdown: str | None = option(None, "file to write the table to")

    def __post_init__(self) -> None:
        check(self)
        check_folder("json", self.json)
        check_folder("markdown", self.markdown)
        if self.resume and self.json is None:
            raise ValueError("resume: --json names the file to go on with")
        if self.peer:
            try:
                version(PEER)
            except PackageNotFoundError:
                raise ValueError(f"peer: {PEER} is not installed") from None


def coverage(settings: CoverageSettings) -> dict[str, Any]:
    """Prune the networks, print a line for each, and write the files that are asked for."""
    listed = zoo.names()
    chosen = [n for n in listed if not settings.only or any(fnmatch.fnmatch(n, pattern) for pattern in settings.only)]
    if not chosen:
        raise ValueError(f"only {' '.join(settings.only)}: no network of the list has such a name")
    document: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "workers": settings.workers,
        "inexact": settings.inexact,
        "torch": torch.__version__,
        **{package: version(package) for package in ("torchvision", "timm", *([PEER] if settings.peer else []))},
        "networks": [],
    }
    console = Console(highlight=False)
    for row in rows(chosen, settings, kept_rows(document, settings)):
        document["networks"].append(row)
        console.print(line(row), markup=False)
        if settings.json is not None:  # after each: what took minutes is not lost where something fails
            atomic.write_text(Path(settings.json), json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    console.print(summary(document), markup=False)
    if settings.markdown is not None:
        atomic.write_text(Path(settings.markdown), markdown(document))
    return document


def kept_rows(document: dict[str, Any], settings: CoverageSettings) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run that are taken over, by network: those without a failure of ours.

    Raises:
        ValueError: if the file is of another machine, other versions or other settings.
    """
    if not settings.resume or not Path(str(settings.json)).exists():
        return {}
    earlier = json.loads(Path(str(settings.json)).read_text(encoding="utf-8"))
    for name, value in document.items():
        if name != "networks" and earlier.get(name) != value:
            raise ValueError(f"resume: {settings.json!r} has {name} {earlier.get(name)!r}, this run {value!r}")
    return {row["name"]: row for row in earlier["networks"] if "error" not in row["ours"]}


def rows(names: Sequence[str], settings: CoverageSettings, kept: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What became of each network; a process of its own each, so that none can take the others with it."""

    def both(name: str) -> dict[str, Any]:
        if name in kept:
            return kept[name]
        row = {"name": name, "ours": in_process("inexact" if settings.inexact else "ours", name, settings.limit)}
        return row | ({"peer": in_process("peer", name, settings.limit)} if settings.peer else {})

    with ThreadPoolExecutor(settings.workers) as pool:
        yield from pool.map(both, names)


def in_process(who: str, name: str, limit: float) -> dict[str, Any]:
    """One network in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "fastprune.bench.coverage", who, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:g} s"}
    found = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if not found:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": last[0]}
    result: dict[str, Any] = json.loads(found[-1])
    return result


def prune_by_half(name: str, *, exact: bool = True) -> dict[str, Any]:
    """Trace, prune every group by a random half of its units, and verify in float64; see ``trace`` for ``exact``."""
    model, size = zoo.create(name)
    begin = time.perf_counter()
    graph = trace(model, torch.zeros(1, *size), exact=exact)
    mask = half(graph)
    full, left = graph.cost(), graph.cost(mask)
    result: dict[str, Any] = {
        "groups": len(graph.groups),
        "units": graph.num_units,
        "macs": int(full.macs),
        "macs_left": float(left.macs / full.macs),
        "prunable": prunable(graph),
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
            counted[0] == plan.macs[1] or macs(model, size) != plan.macs[0]  # torch counts attention, too
        )
    else:
        result["seconds"] = time.perf_counter() - begin
    return result


def half(graph: ChannelGraph) -> Tensor:
    """A mask that keeps a random half of each group's units, at least one."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(graph.num_units)
    for group in graph.groups:
        order = torch.randperm(group.size, generator=generator)
        mask[group.start + order[: max(1, group.size // 2)]] = 1
    return mask


def prunable(graph: ChannelGraph) -> float:
    """The share of MACs that goes if every group is left with one unit."""
    least = graph.cost_model.of_widths(torch.ones(len(graph.groups), dtype=torch.float64))
    return float(1 - least.macs / graph.cost().macs)


def macs(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image as torch counts them."""
    model = copied(model).requires_grad_(False)  # torch's counter fails on modules that are given a parameter
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, *size))
    return int(counter.get_total_flops() // 4)


def prune_by_peer(name: str) -> dict[str, Any]:
    """The same by the peer: every group by half, the last layers left out, as its documentation does it."""
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
    except Exception as error:  # whatever it raises is the finding
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}


def line(row: dict[str, Any]) -> str:
    """One network for the terminal."""
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
    """What became of a network, in a few words."""
    if "error" in ours:
        return "failed"
    if not ours["groups"]:
        return "without a prunable channel"
    if not ours["cost_is_counted"] or (ours["difference"] > 1e-9 and not ours["inexact"]):
        return "wrong"
    return "pruned inexactly" if ours["inexact"] else "pruned exactly"


def summary(document: dict[str, Any]) -> str:
    """How many networks had which outcome, by where they come from."""
    parts = []
    for kind in dict.fromkeys(row["name"].partition(":")[0] for row in document["networks"]):
        found = [row for row in document["networks"] if row["name"].startswith(f"{kind}:")]
        counted = Counter(outcome(row["ours"]) for row in found).most_common()
        text = f"{kind}: of {len(found)} networks " + ", ".join(f"{number} {what}" for what, number in counted)
        if PEER in document:
            text += f"; {sum('error' not in row['peer'] for row in found)} by {PEER} without an error"
        parts.append(text)
    return "\n".join(parts)


INEXACT = [
    "Channels leave norms and statistics over channels, too (`exact=False`). Where they do, `difference` is what the",
    "removal changed beyond closing channels: it is a measurement, in float32, and no error.",
    "",
]


def markdown(document: dict[str, Any]) -> str:
    """The table as a page."""
    peer = PEER in document
    versions = ", ".join(
        f"{name} {document[name]}" for name in ("torch", "torchvision", "timm", PEER) if name in document
    )
    command = f"OMP_NUM_THREADS={document['threads']} fastprune bench coverage --workers {document['workers']}"
    inexact = document["inexact"]
    command += f"{' --inexact' if inexact else ''}{' --peer' if peer else ''}"
    command += f" --markdown docs/coverage{'-inexact' if inexact else ''}.md"
    head = ["network", "groups", "units", "layers kept", "MACs left", "prunable", "s", "difference", "runs"]
    lines = [
        f"# Which networks can be pruned{', where that need not be exact' if inexact else ''}",
        "",
        f"    {command}",
        "",
        f"{versions}; {document['machine']}.",
        "",
        "Every group of channels loses a random half of its units. The compact network is compared with the masked",
        "one on random inputs in float64 (`difference`, relative), and its MACs and parameters with those predicted.",
        "`s` is the time to trace, plan, cut and verify. `runs` says whether the model's own code runs the compact",
        "network, or its graph had to be rewritten. `layers kept` counts convolutions and linear layers with output",
        "channels that always stay, with the operators that are the most frequent reasons. `prunable` is the share of",
        "MACs that goes if every group is left with one unit.",
        "",
        *(INEXACT if inexact else []),
        *summary(document).replace("\n", "\n\n").splitlines(),
        "",
        "| " + " | ".join(head + ([f"{PEER}: MACs left", "s"] if peer else [])) + " |",
        "|" + "---|" * (len(head) + 2 * peer),
    ]
    for row in document["networks"]:
        ours, cells = row["ours"], [row["name"]]
        if "error" in ours:
            cells += ["", "", "", "", "", "", "", f"failed: {ours['error']}"]
        else:
            reasons = ", ".join(ours["reasons"])
            cells += [
                f"{ours['groups']}", f"{ours['units']:,}", f"{ours['kept']} of {ours['layers']}: {reasons}",
                f"{ours['macs_left']:.2f}", f"{100 * ours['prunable']:.1f} %", f"{ours['seconds']:.1f}",
                f"{ours['difference']:.0e}" if "difference" in ours else "",
                {True: "rewritten", False: "own code", None: ""}[ours.get("rewritten")],
            ]  # fmt: skip
        if peer:
            theirs = row["peer"]
            failed = theirs.get("error", "").partition(":")[0]
            cells += [failed, ""] if failed else [f"{theirs['macs_left']:.2f}", f"{theirs['seconds']:.1f}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(who: str, name: str) -> None:
    """Write one network's result as a line of JSON."""
    try:
        result = prune_by_peer(name) if who == "peer" else prune_by_half(name, exact=who != "inexact")
    except Exception as error:  # one network's failure is a row of the table
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
