"""Tables on the terminal. Nothing here imports torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastprune.methods.plugins import MethodInfo

NARROW = 110  # columns of a terminal that has no room for venues beside what methods do
PIPED = 10_000  # columns of a table that goes into a pipe or a file: enough for every line


def millions(value: float) -> str:
    """Return a count in millions, with two decimals; in thousands if that would leave no digit."""
    return f"{value / 1e6:,.2f} M" if value >= 1e4 or not value else f"{value / 1e3:,.2f} K"


def percent(value: float) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * value:.2f} %"


def show(table: Table) -> None:
    """Print a table on standard output, without markup: a layer's name may look like rich's.

    On a terminal, cells fold at its width. A pipe gets whole lines, unless ``COLUMNS`` says how long they may be.
    """
    for column in table.columns:
        column.overflow = "fold" if column.overflow == "ellipsis" and not column.no_wrap else column.overflow
    make_console().print(table)


def make_console() -> Console:
    """Return the console of standard output, as wide as a table needs where nobody looks at it directly."""
    piped = not sys.stdout.isatty() and not os.environ.get("COLUMNS")
    return Console(markup=False, highlight=False, width=PIPED if piped else None)


def print_methods(methods: Iterable[MethodInfo]) -> None:
    """Print one line for each method; on a terminal what it does is cut off at the margin."""
    table, is_narrow = Table(), make_console().width < NARROW
    table.add_column("method", no_wrap=True)
    table.add_column("needs", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    table.add_column("what it does")  # this column gives way where the terminal is narrow
    for info in methods:
        needs = "data" if info.needs_data else ""
        foreign = f" ({info.package} {info.version})" if info.package != "fastprune" else ""
        summary = Text(info.summary + foreign, no_wrap=True, overflow="ellipsis")
        table.add_row(info.name, needs, short_paper(info.paper, very=is_narrow), summary)
    show(table)
    Console(markup=False).print("next: fastprune methods NAME", soft_wrap=True, highlight=False)


def short_paper(paper: str, *, very: bool = False) -> str:
    """Return authors and venue of "Li et al., Title, ICLR 2017"; texts of another form as they are.

    Args:
        paper: the paper as a method names it.
        very: whether a name and a year are enough: "Li 2017".
    """
    authors, _, rest = paper.partition(", ")
    if very:
        return " ".join([*authors.split()[:1], *re.findall(r"\b\d{4}\b", rest)[-1:]])
    venue = re.sub(r" \(.*\)$", "", rest.rpartition(", ")[2])  # without a remark such as "(its baseline)"
    return f"{authors}, {venue}" if authors and venue and len(venue) <= 16 else authors


def print_recipes(recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one line for each recipe."""
    table = Table()
    table.add_column("recipe", no_wrap=True)
    for heading in ("budget", "top-1 of the paper"):
        table.add_column(heading)
    for name, recipe in recipes.items():
        paper = recipe.get("paper", {})
        tops = [paper.get(key) for key in ("baseline_top1", "pruned_top1")]
        shown = " → ".join("–" if top is None else f"{top:.2f}" for top in tops)
        table.add_row(name, as_text(recipe.get("budget", "none")), shown)
    show(table)


def print_method(info: MethodInfo) -> None:
    """Print what is known of a method, with its options."""
    console = Console(markup=False, highlight=False)
    console.print(f"{info.name}: {info.summary}")
    for what, text in {
        "paper": info.paper or "none",
        "package": f"{info.package} {info.version}",
        "searches on data": as_text(info.needs_data),
    }.items():
        console.print(f"{what}: {text}")
    table = Table()
    for heading in ("option", "default", "meaning"):
        table.add_column(heading)
    for option in info.options:
        choices = f" ({option.type})" if "'" in option.type else ""
        table.add_row(option.name, as_text(option.default), option.help + choices)
    show(table)
    data = " --data DATA" if info.needs_data else ""
    console.print(f"next: fastprune prune --method {info.name} --model MODEL --weights FILE{data} --out RUN")


def print_broken(reasons: Mapping[str, str]) -> None:
    """Print the plugins that are left out, on standard error."""
    for name, reason in reasons.items():
        Console(stderr=True, markup=False).print(f"method {name!r} is left out: {reason}", style="red", soft_wrap=True)


def as_text(value: Any) -> str:
    """Return a value as people read it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def print_checks(checks: Mapping[str, Any]) -> None:
    """Print the findings of ``doctor``."""
    table = Table()
    table.add_column("check")
    table.add_column("finding")
    for name, value in checks.items():
        if isinstance(value, Mapping):
            value = "\n".join(f"{key}: {as_text(item)}" for key, item in value.items()) or "none"
        table.add_row(name.replace("_", " "), as_text(value))
    show(table)


def print_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the results of networks, one row each."""
    table = Table()
    table.add_column("network")
    present = [name for name in COLUMNS if any(name in row for row in results.values())]
    for name in present:
        table.add_column(COLUMNS[name][0], justify="right")
    for network, row in results.items():
        table.add_row(network, *(COLUMNS[name][1](row[name]) if name in row else "" for name in present))
    show(table)


def print_demo(result: Mapping[str, Any]) -> None:
    """Print the stages of the demonstration."""
    print_results({stage["stage"]: stage for stage in result["stages"]})
    Console().print(f"{result['seconds']:.0f} s; run directory: {result['run']}", soft_wrap=True, highlight=False)


COLUMNS: dict[str, tuple[str, Any]] = {
    "accuracy": ("accuracy", percent),
    "top5": ("top-5", percent),
    "held_out_accuracy": ("held-out accuracy", percent),
    "held_out_top5": ("held-out top-5", percent),
    "loss": ("loss", lambda value: f"{value:.4g}"),
    "held_out_loss": ("held-out loss", lambda value: f"{value:.4g}"),
    "macs": ("MACs", millions),
    "params": ("parameters", millions),
    "ms": ("modelled latency", lambda value: f"{value:.2f} ms"),
    "measured_ms": ("latency", lambda value: f"{value:.2f} ms"),
    "latency_ms": ("CPU latency (batch 64)", lambda value: f"{value:.2f} ms"),
}
