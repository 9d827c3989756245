"""Figures of several panels, after those of the papers. They need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastprune.report.block_widths import Widths
from fastprune.report.differences import Panel
from fastprune.report.gate_training import CostTerm, MaskEdge, Training, distances_around
from fastprune.report.plots import COLOURS, GREY, INK, ROUND_NUMBERS, draw_line, look
from fastprune.report.proxy_ranking import Ranking

MOST = 6
"""Panels of a figure: more would not fit a screen."""

DASHED = (0, (5, 3))
TICK_SIZE = 8


def make_panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels, two beside each other, and their axes."""
    columns, rows = min(2, count), ceil(count / 2)
    figure = Figure(figsize=(6.4, 3.6 if rows == 1 else 0.6 + 2.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for unused in axes[count:]:
        unused.set_visible(False)
    for one in axes:
        one.tick_params(labelsize=TICK_SIZE)
        one.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return figure, axes[:count]


def set_title(axes: Axes, text: str) -> None:
    """Write a panel's title; the middle of a long one is left out."""
    axes.set_title(text if len(text) <= 34 else f"{text[:16]}…{text[-17:]}", fontsize=8, loc="left")


def put_legend(figure: Figure) -> None:
    """Put one legend for all panels below them; equal labels are one entry."""
    entries = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries.update(dict(zip(labels, handles, strict=True)))
    columns = 2 if max(map(len, entries)) < 40 else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.17 * max(0, ceil(len(entries) / columns) - 2))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)


def compared(panels: Sequence[Panel], x_label: str, y_label: str) -> Figure:
    """Draw curves of fractions, with bands over seeds, in panels that share their axes: Fig. 4 of DDNP."""
    figure, axes = make_panels(len(panels))
    for place, (one, panel) in enumerate(zip(axes, panels, strict=True)):
        for line in panel.lines:
            draw_line(one, line)
        set_title(one, panel.title)
        one.sharey(axes[0])
        one.set_xlim(left=0)
        one.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        one.set_xlabel(x_label)
        if place % 2 == 0:
            one.set_ylabel(y_label)
    put_legend(figure)
    return figure


def accuracy_and_regulariser(trainings: Sequence[Training]) -> Figure:
    """Draw accuracy and R over the same epochs, a panel for each search: Fig. 5 (a–d) of DMC."""
    figure, axes = make_panels(len(trainings))
    for place, (one, training) in enumerate(zip(axes, trainings, strict=True)):
        other = one.twinx()
        for side, colour, dashes, curve, label in (
            (one, COLOURS[0], "-", training.accuracy, "held-out accuracy (left axis)"),
            (other, COLOURS[1], "--", training.regulariser, "regulariser R (right axis)"),
        ):
            marker = "o" if len(curve) <= 40 else ""
            side.plot(
                list(curve), list(curve.values()), color=colour, linestyle=dashes, marker=marker, markersize=2.5,
                label=label,
            )  # fmt: skip
        one.set_xlim(left=0)
        one.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        one.set_xlabel("epochs of the search")
        other.set_ylim(bottom=0)
        other.grid(visible=False)
        other.spines["right"].set_visible(True)
        other.tick_params(labelsize=TICK_SIZE)
        other.yaxis.set_major_locator(MaxNLocator(5))
        if place % 2 == 0:
            one.set_ylabel("held-out accuracy")
        if place % 2 == 1 or place + 1 == len(trainings):
            other.set_ylabel("regulariser R")
        set_title(one, training.label)
    put_legend(figure)
    return figure


def cost_terms(terms: Sequence[CostTerm]) -> Figure:
    """Draw values and slopes of cost terms R with the searches on them, beside MAE and MSE: Fig. 2 of DMC."""
    figure, (values, slopes) = make_panels(2)
    distances = distances_around(terms)
    for place, term in enumerate(terms):
        colour, dashes = look(place)
        value, slope = term.sample(distances)
        label = f"{term.formula}, p = {term.target:.3g}" if term.depends_on_target else term.formula
        values.plot(distances, value, color=colour, linestyle=dashes, label=label)
        slopes.plot(distances, slope, color=colour, linestyle=dashes, label=label)
        x, y = zip(*term.points, strict=True)
        values.plot(x, y, color=colour, marker="o", linestyle="", markersize=3.5, fillstyle="none")
    absolute, square = [abs(x) for x in distances], [x**2 for x in distances]
    values.plot(distances, absolute, color=INK, linewidth=0.9, linestyle="--", label="|r − p| (MAE)")
    values.plot(distances, square, color=INK, linewidth=0.9, linestyle=":", label="(r − p)² (MSE)")
    slopes.plot(distances, [x / abs(x) for x in distances], color=INK, linewidth=0.9, linestyle="--")
    slopes.plot(distances, [2 * x for x in distances], color=INK, linewidth=0.9, linestyle=":")
    values.plot(
        [], [], color=INK, marker="o", linestyle="", markersize=3.5, fillstyle="none", label="a line of a search's log"
    )
    for axes, label in ((values, "value of R"), (slopes, "slope of R")):
        axes.set_xlabel("cost ratio minus target, r − p")
        axes.set_ylabel(label)
        axes.axvline(0, color=INK, linewidth=0.6)
    put_legend(figure)
    return figure


def mask_edges(edges: Sequence[MaskEdge]) -> Figure:
    """Draw masks over the ranks of channels: the function, its values, and the naive binary mask: Fig. 2 of DDNP."""
    figure, axes = make_panels(len(edges))
    for place, (one, edge) in enumerate(zip(axes, edges, strict=True)):
        binary = [0.5, edge.centre + 0.5, edge.centre + 0.5, edge.size + 0.5]
        one.plot(binary, [1, 1, 0, 0], color=COLOURS[1], linestyle="--", linewidth=1, label="naive binary mask")
        one.plot(edge.ranks, edge.function, color=COLOURS[0], label="mask of the search")
        one.plot(
            range(1, edge.size + 1), edge.values, color=COLOURS[0], marker="s", markersize=3, linestyle="",
            label="its values at the channels",
        )  # fmt: skip
        set_title(one, edge.title)
        one.set_xlabel(f"rank; C = {edge.size}, Ck = {edge.centre:.3g}, γ = {edge.window:.3g}")
        if place % 2 == 0:
            one.set_ylabel("mask")
    put_legend(figure)
    return figure


def widths(panels: Sequence[Widths], x_label: str) -> Figure:
    """Draw widths from the image to the classes; dashed: the full network. Fig. 3 of DDNP, Fig. 5 and 6 of SP."""
    figure, axes = make_panels(len(panels))
    for place, (one, panel) in enumerate(zip(axes, panels, strict=True)):
        steps = range(1, len(panel.full) + 1)
        one.plot(steps, panel.full, color=INK, linestyle=DASHED, linewidth=1, label="full network")
        for label, (number, kept) in panel.kept.items():
            colour, dashes = look(number)
            one.plot(steps, kept, color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
        set_title(one, panel.title)
        one.xaxis.set_major_locator(ROUND_NUMBERS())
        one.set_ylim(bottom=0)
        one.set_xlabel(x_label)
        if place % 2 == 0:
            one.set_ylabel("channels")
    put_legend(figure)
    return figure


def rankings(found: Sequence[Ranking]) -> Figure:
    """Draw accuracies after training over proxies, a panel for each proxy, with rank correlations: Fig. 4 of SP."""
    figure, axes = make_panels(len(found))
    for place, (one, ranking) in enumerate(zip(axes, found, strict=True)):
        means = ranking.means
        for x, own in zip(ranking.proxies, ranking.accuracies, strict=True):
            one.plot([x, x], [min(own), max(own)], color=GREY, linewidth=2)
        one.plot(ranking.proxies, means, color=COLOURS[0], marker="o", markersize=4, linestyle="")
        rho = "none" if ranking.correlation is None else f"{ranking.correlation:.2f}".replace("-", "−")
        set_title(one, f"{ranking.title}: ρ = {rho}" if ranking.title else f"ρ = {rho}")
        one.margins(0.08)
        one.xaxis.set_major_locator(MaxNLocator(3))
        one.set_xlabel(fill(ranking.label, 22))
        one.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        if place % 2 == 0:
            one.set_ylabel("accuracy after training")
    return figure
