"""Results of benchmarks: tables for people, one JSON document for programs."""

from __future__ import annotations

import datetime as dt
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastprune import _C
from fastprune.bench.case import OURS
from fastprune.bench.ceilings import Ceilings
from fastprune.host.machine import machine

WIDEST = 1000  # characters: in a narrow terminal broken lines are better than hidden digits


def document(results: Mapping[str, Mapping[str, Any]], ceilings: Ceilings, *, quick: bool) -> dict[str, Any]:
    """Return the numbers by kernel, with all facts that a later reader needs."""
    return {
        "device": ceilings.device.type,
        "machine": machine(ceilings.device),
        "threads": torch.get_num_threads(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fastprune": version("fastprune"),
        "build": _C.build_info(),
        "quick": quick,
        "ceilings": ceilings.describe(),
        "kernels": dict(results),
    }


def geometric_means(cases: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the geometric mean of each peer's ratios, and the number of its cases."""
    ratios: dict[str, list[float]] = {}
    for case in cases:
        for name, found in case["ratios"].items():
            ratios.setdefault(name, []).append(found["ratio"])
    return {
        name: {"ratio": math.exp(math.fsum(map(math.log, values)) / len(values)), "cases": len(values)}
        for name, values in ratios.items()
    }


def grouped_means(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the geometric means of each group of cases; "a, b", a part of "a", follows it."""
    groups = sorted({group for case in cases for group in case["groups"]}, key=lambda group: group.split(", "))
    return {group: geometric_means(case for case in cases if group in case["groups"]) for group in groups}


def show(name: str, document: Mapping[str, Any]) -> None:
    """Print one kernel's table, the machine and the ceilings above it, and below it all failures and omissions."""
    console = Console(markup=False, highlight=False, width=WIDEST)
    kernel = document["kernels"][name]
    console.print(heading(name, document), soft_wrap=True)
    if kernel["cases"]:
        console.print(table(kernel))
    for case in kernel["cases"]:
        for variant, reason in case["failures"].items():
            console.print(f"{case['name']}: {variant} fails: {reason}", soft_wrap=True)
    for text in kernel["left_out"]:
        console.print(f"left out: {text}", soft_wrap=True)


def heading(name: str, document: Mapping[str, Any]) -> str:
    """Describe the machine of the numbers, and its ceilings."""
    ceilings = document["ceilings"]
    threads = f", {document['threads']} thread(s)" if document["device"] == "cpu" else ""
    rates = [f"{rate / 1e9:,.0f} GFLOP/s {kind}" for kind, rate in ceilings["matmul_flops_per_second"].items()]
    measured = [f"copy {ceilings['copy_bytes_per_second'] / 1e9:,.1f} GB/s", *rates]
    measured.append(f"call {ceilings['call_seconds'] * 1e6:.1f} µs")
    lines = [
        f"{name} on {document['machine']}{threads}, torch {document['torch']}, fastprune {document['fastprune']}",
        f"ceilings: {', '.join(measured)}",
    ]
    if document["quick"]:
        lines.append("quick: the numbers mean little")
    return "\n".join(lines)


def table(kernel: Mapping[str, Any]) -> Table:
    """Tabulate medians, each peer's ratio to ours with quartiles, and our share of the roofline."""
    cases = kernel["cases"]
    names = list(dict.fromkeys(name for case in cases for name in (*case["variants"], *case["failures"])))
    names.sort(key=lambda name: name == OURS)  # ours last, the peers in their order
    with_units = any(case["units"] for case in cases)
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("case", no_wrap=True)
    with_samples = any(case["samples"] for case in cases)
    more = list(dict.fromkeys(name for case in cases for name, value in case["more"].items() if is_number(value)))
    for heading in (*names, *["ns/unit"] * with_units, *["samples/s"] * with_samples, *more, "of roofline"):
        result.add_column(Text(heading), justify="right", no_wrap=True)
    for case in cases:
        ours = case["variants"][OURS]
        units = f"{ours['median_seconds'] / case['units'] * 1e9:.1f}" if case["units"] else ""
        samples = f"{ours['samples_per_second']:,.1f}" if case["samples"] else ""
        others = [format_ratio(case["more"][name]) if name in case["more"] else "" for name in more]
        share = f"{100 * ours['share_of_roofline']:.1f} %"
        rest = (*[units] * with_units, *[samples] * with_samples, *others, share)
        result.add_row(Text(case["name"]), *(cell(case, name) for name in names), *rest)
    result.add_section()
    groups = {f", {group}": means for group, means in kernel["groups"].items()} or {"": kernel["geometric_means"]}
    for group, means in groups.items():
        texts = [mean_cell(means.get(name)) for name in names]
        result.add_row(Text(f"geometric mean{group}"), *texts, *[""] * (with_units + with_samples + len(more) + 1))
    return result


def is_number(value: Any) -> bool:
    """Return whether a value gets a column; all others are for programs."""
    return isinstance(value, (int, float))


def cell(case: Mapping[str, Any], name: str) -> str:
    """Return one variant's time in one case."""
    if name in case["failures"]:
        return "fails"
    if name not in case["variants"]:
        return ""
    median = format_seconds(case["variants"][name]["median_seconds"])
    if name not in case["ratios"]:
        return median
    found = case["ratios"][name]
    return f"{median}\n{format_ratio(found['ratio'])}x ({'–'.join(map(format_ratio, found['quartiles']))})"


def mean_cell(mean: Mapping[str, float] | None) -> str:
    """Return one peer's geometric mean and the number of its cases."""
    return "" if mean is None else f"{format_ratio(mean['ratio'])}x of {mean['cases']}"


def format_ratio(ratio: float) -> str:
    """Format a ratio with three digits."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def format_seconds(seconds: float) -> str:
    """Format a time in microseconds with three digits or more."""
    value = seconds * 1e6
    return f"{value:,.0f} µs" if value >= 100 else f"{value:.1f} µs"
