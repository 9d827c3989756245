"""Tables of a channel graph on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fastprune.graph import ChannelGraph
from fastprune.report.tables import as_text, make_console, millions, percent, show

BORDERS = 10  # columns that the lines between three columns of a table take
LEAST_REASON = 18  # columns that a reason needs to be read easily


def print_graph(name: str, graph: ChannelGraph) -> None:
    """Print a network's cost, its groups, and its layers with the channels that stay."""
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
        exact = [] if graph.exact else [as_text(group.exact)]
        table.add_row(group.name, f"{group.size:,}", group.kind, percent(group.share), str(len(group.layers)), *exact)
    if graph.groups:
        show(table)
    if any(group.kind == "stream" for group in graph.groups):
        Console(markup=False, highlight=False).print("stream: channels that pass residual additions")
    print_layers(graph)
    if not graph.exact:
        text = f"not exact for {int(graph.inexact_units.sum()):,} units, whose channels are mixed by:"
        Console(markup=False).print(text, *graph.inexact, sep="\n  ", soft_wrap=True, highlight=False)


def print_layers(graph: ChannelGraph) -> None:
    """Print the layers with their groups and the reasons why channels stay; where there is room, names are whole."""
    rows = [(row.layer, ", ".join(row.groups), row.reason or "") for row in graph.table()]
    names = sum(max((len(row[n]) for row in rows), default=0) for n in range(2))
    table = Table()
    for heading in ("layer", "group"):
        table.add_column(heading, no_wrap=names + BORDERS + LEAST_REASON <= make_console().width)
    table.add_column("channels that stay")
    for row in rows:
        table.add_row(*row)
    show(table)


def print_difference(difference: float, operators: Sequence[str]) -> None:
    """Print how much a compact network differs from the masked one, and the operators that mix channels."""
    text = f"not exact: outputs differ by {difference:.1e} (of the largest, on a random input), because channels left:"
    Console(markup=False).print(text, *operators, sep="\n  ", soft_wrap=True, highlight=False)
