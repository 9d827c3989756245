"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fastprune.graph import ChannelGraph
from fastprune.methods.registry import MethodInfo


def millions(value: float) -> str:
    """A count in millions, with two digits behind the point."""
    return f"{value / 1e6:,.2f} M"


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.2f} %"


def show(table: Table) -> None:
    """Print a table on standard output, its texts as they are (a layer's name may look like rich's markup)."""
    Console(markup=False).print(table)


def print_graph(name: str, graph: ChannelGraph) -> None:
    """A network's cost, groups and layers that cannot be pruned."""
    cost = graph.cost()
    macs, params = (millions(float(x)) for x in (cost.macs, cost.params))
    sizes = f"{len(graph.groups)} groups, {graph.num_units:,} units, {macs} MACs, {params} parameters"
    Console(markup=False).print(f"{name}: {sizes}", soft_wrap=True, highlight=False)
    table = Table()
    for heading, side in (
        ("group", "left"),
        ("units", "right"),
        ("kind", "left"),
        ("share of MACs", "right"),
        ("layers", "right"),
        *([] if graph.exact else [("exact", "left")]),
    ):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for group in graph.groups:
        exact = [] if graph.exact else [listed(group.exact)]
        table.add_row(group.name, f"{group.size:,}", group.kind, percent(group.share), str(len(group.layers)), *exact)
    if graph.groups:
        show(table)
    layers = Table()
    for heading in ("layer", "group", "channels that stay"):
        layers.add_column(heading)
    for row in graph.table():
        layers.add_row(row.layer, ", ".join(row.groups), row.reason or "")
    show(layers)
    if not graph.exact:
        text = f"not exact for {int(graph.inexact_units.sum()):,} units, whose channels are mixed by:"
        Console(markup=False).print(text, *graph.inexact, sep="\n  ", soft_wrap=True, highlight=False)


def print_difference(difference: float, operators: Sequence[str]) -> None:
    """How much a compact network differs from the masked one, and what it is that mixes channels."""
    text = f"not exact: outputs differ by {difference:.1e} of the largest on a random input, as channels left:"
    Console(markup=False).print(text, *operators, sep="\n  ", soft_wrap=True, highlight=False)


def print_methods(methods: Iterable[MethodInfo], broken: Mapping[str, str]) -> None:
    """The installed methods and their options, and the plugins that are broken."""
    table = Table()
    for heading in ("name", "package", "paper", "options"):
        table.add_column(heading)
    for info in methods:
        table.add_row(info.name, f"{info.package} {info.version}", info.paper, ", ".join(o.name for o in info.options))
    show(table)
    for name, reason in broken.items():
        Console(stderr=True, markup=False).print(f"method {name!r} is left out: {reason}", style="red", soft_wrap=True)


def listed(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def print_checks(checks: Mapping[str, Any]) -> None:
    """What ``doctor`` found."""
    table = Table()
    table.add_column("what")
    table.add_column("finding")
    for name, value in checks.items():
        if isinstance(value, Mapping):
            value = "\n".join(f"{key}: {listed(item)}" for key, item in value.items()) or "none"
        table.add_row(name.replace("_", " "), listed(value))
    show(table)


def print_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Networks side by side."""
    table = Table()
    table.add_column("network")
    present = [name for name in COLUMNS if any(name in row for row in results.values())]
    for name in present:
        table.add_column(COLUMNS[name][0], justify="right")
    for network, row in results.items():
        table.add_row(network, *(COLUMNS[name][1](row[name]) if name in row else "" for name in present))
    show(table)


def print_demo(result: Mapping[str, Any]) -> None:
    """The demonstration's stages."""
    print_results({stage["stage"]: stage for stage in result["stages"]})
    Console().print(f"{result['seconds']:.0f} s; run directory: {result['run']}", soft_wrap=True, highlight=False)


COLUMNS: dict[str, tuple[str, Any]] = {
    "accuracy": ("accuracy", percent),
    "macs": ("MACs", millions),
    "params": ("parameters", millions),
    "ms": ("latency as modelled", lambda value: f"{value:.2f} ms"),
    "measured_ms": ("latency", lambda value: f"{value:.2f} ms"),
    "latency_ms": ("CPU latency (batch 64)", lambda value: f"{value:.2f} ms"),
}
