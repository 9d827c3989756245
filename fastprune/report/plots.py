"""Figures: curves, heat maps of widths over epochs, and bars of final widths. They need matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastprune.host import atomic
from fastprune.report.log import Line

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; their yellow is too light for lines.
INK = "#1A1B1C"  # a colour of its own, so that pages can replace it
GRID = "#E5E6E7"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5B5C")
DASHES = ("-", "--", ":", "-.")  # for more runs than colours
GREY = "#DFE0E1"
ROUND_NUMBERS = partial(MaxNLocator, nbins=8, integer=True, steps=[1, 2, 5, 10])

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "svg.hashsalt": "fastprune",  # the same figure is the same file
    "text.parse_math": False,  # a dollar in the name of a run or layer is a dollar
}


# Sizes of text in parts of the axes of a trade-off chart, as large as they are on a narrow page.
LETTER, LINE, DOT, POINT_RIGHT, POINT_UP = 0.018, 0.065, 0.016, 0.003, 0.006
SPOTS = (
    ("center", 0, 7), ("center", 0, -14), ("left", 6, -3), ("right", -6, -3), ("left", 4, 5), ("right", -4, 5),
    ("left", 4, -12), ("right", -4, -12), ("center", 0, 17), ("center", 0, -24),
)  # fmt: skip
"""(side of the label that is at the point, points of print to the right, and up), in the order of the tries."""

MOST_INCHES = 13.0  # of bars below one another


@contextmanager
def style() -> Iterator[None]:
    """Use the style of reports, whatever the user's matplotlibrc says, while figures are drawn and saved."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``name.png`` and ``name.svg``."""
    for kind in ("png", "svg"):
        # Without a date the same figure is the same file.
        fill = partial(figure.savefig, format=kind, metadata={"Date": None} if kind == "svg" else {})
        atomic.write(folder / f"{name}.{kind}", fill)


def look(number: int) -> tuple[str, str]:
    """Return the colour and the dashes of the run with this number."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def curves(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    percent: bool = False,
    dashed: Mapping[str, float] | None = None,
) -> Figure:
    """Draw curves over epochs or steps, with bands over several seeds.

    Args:
        lines: one line for each run, or for each group of seeds.
        x_label: label of the x-axis, with its unit.
        y_label: label of the y-axis, with its unit.
        percent: whether the values are fractions to show as percentages.
        dashed: {text in the legend: height of a horizontal line}.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        draw_line(axes, line)
    for text, value in (dashed or {}).items():
        axes.axhline(value, color=INK, linestyle=(0, (5, 3)), linewidth=1, label=text)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(ROUND_NUMBERS())
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.legend(loc="outside lower center", ncols=2 if max(len(line.label) for line in lines) < 40 else 1)
    return figure


def draw_line(axes: Axes, line: Line) -> None:
    """Draw one curve, with its band if it has one."""
    colour, dashes = look(line.number)
    marker = "o" if len(line.x) <= 40 else ""
    axes.plot(line.x, line.y, color=colour, linestyle=dashes, marker=marker, markersize=3, label=line.label)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)


def heat_map(title: str, kept: Mapping[str, Mapping[float, float]]) -> Figure:
    """Draw the fraction of each layer's channels that is open, over epochs.

    Args:
        title: the run's label.
        kept: {layer: {epochs done: fraction in [0, 1]}}.
    """
    epochs = sorted({epoch for curve in kept.values() for epoch in curve})
    values = [[curve.get(epoch, float("nan")) for epoch in epochs] for curve in kept.values()]
    row = min(0.17, 9 / len(kept))  # inches; a figure of hundreds of layers still fits a screen
    figure = Figure(figsize=(6.4, 1.4 + row * len(kept)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(epochs[0] - 0.5, epochs[-1] + 0.5, len(kept) - 0.5, -0.5),
    )  # fmt: skip
    axes.grid(visible=False)
    every = ceil(0.13 / row)  # rows that one name covers
    axes.set_yticks(range(0, len(kept), every), list(kept)[::every], fontsize=7)
    axes.xaxis.set_major_locator(ROUND_NUMBERS())
    axes.set_xlabel("epochs of the search")
    axes.set_title(title, fontsize=9, loc="left")
    figure.colorbar(image, ax=axes, label="channels that stay", format=PercentFormatter(xmax=1), shrink=0.9, pad=0.02)
    return figure


def widths(layers: Mapping[str, int], runs: Mapping[str, Sequence[int]], numbers: Sequence[int]) -> Figure:
    """Draw bars of the channels that stay in each layer, several runs side by side, in front of all channels.

    Args:
        layers: {layer: number of its channels}.
        runs: {run: channels that stay, by layer}.
        numbers: places of these runs among all runs of the report.
    """
    row = max(0.2, 0.13 * len(runs) + 0.06)  # inches
    if row * len(layers) > MOST_INCHES:
        return profile(layers, runs, numbers)
    bar = 0.8 / len(runs)
    figure = Figure(figsize=(6.4, 1.2 + row * len(layers) + 0.15 * len(runs)), layout="constrained")
    axes = figure.subplots()
    places = range(len(layers))
    axes.barh(places, list(layers.values()), height=0.9, color=GREY, label="all channels")
    for position, (number, (run, kept)) in enumerate(zip(numbers, runs.items(), strict=True)):
        own = [place + (position + 0.5) * bar - 0.4 for place in places]
        bars = axes.barh(own, kept, height=bar * 0.92, color=look(number)[0], label=run)
        axes.bar_label(bars, padding=1.5, fontsize=6)
    axes.set_yticks(places, [f"{layer} ({size})" for layer, size in layers.items()], fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0, 1.04 * max(layers.values()))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("channels that stay")
    handles = [Patch(color=GREY, label="all channels (number behind the layer's name)")]
    handles += [Patch(color=look(number)[0], label=run) for number, run in zip(numbers, runs, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if max(map(len, runs)) < 40 else 1)
    return figure


def profile(layers: Mapping[str, int], runs: Mapping[str, Sequence[int]], numbers: Sequence[int]) -> Figure:
    """Draw the channels that stay along the depth of a network that has too many layers for a bar with a name each.

    Args: as for ``widths``.
    """
    figure = Figure(figsize=(12.8, 3.6), layout="constrained")
    axes = figure.subplots()
    edges = [place - 0.5 for place in range(len(layers) + 1)]
    axes.stairs(list(layers.values()), edges, fill=True, color=GREY, label="all channels")
    for number, (run, kept) in zip(numbers, runs.items(), strict=True):
        colour, dashes = look(number)
        axes.stairs(kept, edges, color=colour, linestyle=dashes, linewidth=1.3, label=run, fill=len(runs) == 1)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layers, from the image to the classes")
    axes.set_ylabel("channels that stay")
    axes.xaxis.set_major_locator(ROUND_NUMBERS())
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside lower center", ncols=2 if max(map(len, runs)) < 40 else 1)
    return figure


@dataclass(frozen=True)
class Point:
    """One run of a trade-off chart.

    Args:
        number: place of its method or family among the colours.
        label: its text at the point.
        x: cost of the compact network.
        pruned: accuracy before fine-tuning; None if it is unknown.
        last: accuracy in the end.
    """

    number: int
    label: str
    x: float
    pruned: float | None
    last: float


@dataclass(frozen=True)
class TradeOff:
    """Accuracy over one cost, of several runs.

    Args:
        points: the runs.
        families: the text in the legend for each number of the points.
        baseline: (cost, accuracy) of the full network.
        x_label: label of the x-axis, with its unit.
        networks: {full network: (cost, accuracy)}, if the runs began with different ones.
        joined: whether lines join the points of a family.
    """

    points: Sequence[Point]
    families: Sequence[str]
    baseline: tuple[float, float] | None
    x_label: str
    networks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    joined: bool = True


def trade_offs(*charts: TradeOff) -> Figure:
    """Draw accuracy over costs side by side: one point for each run, and the full network.

    A hollow point is the accuracy before fine-tuning.
    """
    figure = Figure(figsize=(6.4 * len(charts), 4.2), layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        draw_trade_off(axes, chart)
    families = charts[0].families
    handles, labels = figure.axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # one for all full networks
    columns = 2 if max(map(len, families)) < 40 else 1
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns * len(charts))
    return figure


def draw_trade_off(axes: Axes, chart: TradeOff) -> None:
    """Draw one chart of ``trade_offs``."""
    for number, family in enumerate(chart.families):
        own = sorted((point for point in chart.points if point.number == number), key=lambda point: point.x)
        colour, dashes = look(number)
        dashes = dashes if chart.joined else ""
        axes.plot([p.x for p in own], [p.last for p in own], color=colour, linestyle=dashes, marker="o", label=family)
        for point in own:
            if point.pruned is not None and point.pruned != point.last:
                axes.plot([point.x] * 2, [point.pruned, point.last], color=colour, linewidth=0.7, linestyle=":")
                axes.plot(point.x, point.pruned, color=colour, marker="o", fillstyle="none", markersize=5)
    if chart.baseline is not None:
        axes.plot(*chart.baseline, color=INK, marker="D", linestyle="", label="full network")
        axes.axhline(chart.baseline[1], color=INK, linestyle=(0, (5, 3)), linewidth=0.8)
    for place in chart.networks.values():
        axes.plot(*place, color=INK, marker="D", linestyle="", label="full networks")
    if any(point.pruned not in (None, point.last) for point in chart.points):
        axes.plot([], [], color=INK, marker="o", fillstyle="none", linestyle="", label="before fine-tuning")
    axes.margins(x=0.12, y=0.14)
    # Accuracies before fine-tuning may be at chance: they must not squeeze those that count.
    heights = [point.last for point in chart.points] + ([] if chart.baseline is None else [chart.baseline[1]])
    heights += [accuracy for _, accuracy in chart.networks.values()]
    lowest = min(heights) - max(0.8 * (max(heights) - min(heights)), 0.01)
    bottom = max(axes.get_ylim()[0], lowest)
    axes.set_ylim(bottom, max(heights) + 0.25 * (max(heights) - bottom))
    axes.set_xlim(left=max(0, axes.get_xlim()[0]))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel("test accuracy (top 1)")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick < 1 + 1e-9])
    runs = sorted(((point.label, point.x, point.last) for point in chart.points), key=lambda label: -label[2])
    full = [] if chart.baseline is None else [chart.baseline]
    place_labels(axes, [*((name, *place) for name, place in chart.networks.items()), *runs], full)


def place_labels(
    axes: Axes, labels: Sequence[tuple[str, float, float]], others: Sequence[tuple[float, float]] = ()
) -> None:
    """Write labels beside their points, where no other label and no point is; leave out those that fit nowhere.

    Args:
        axes: the axes; their limits must not change afterwards.
        labels: (text, x, y) of the points, those first that matter most.
        others: points without a label.
    """
    places = [tuple(map(float, axes.transLimits.transform(xy))) for xy in [*(label[1:] for label in labels), *others]]
    taken = [(x - DOT, x + DOT, y - DOT, y + DOT) for x, y in places]
    for nth, (text, x, y) in enumerate(labels):
        for side, right, up in SPOTS:
            box = _label_box(places[nth], len(text) * LETTER, side, right, up)
            inside = box[0] >= 0 and box[1] <= 1 and box[2] >= 0 and box[3] <= 1
            free = not any(_overlap(box, other) for place, other in enumerate(taken) if place != nth)
            if inside and free:
                taken.append(box)
                axes.annotate(text, (x, y), xytext=(right, up), textcoords="offset points", ha=side, fontsize=8)
                break


Box = tuple[float, float, float, float]
"""Left, right, bottom and top in parts of the axes."""


def _label_box(place: Sequence[float], width: float, side: str, right: float, up: float) -> Box:
    x, y = place[0] + right * POINT_RIGHT, place[1] + up * POINT_UP
    left = x - {"center": width / 2, "left": 0, "right": width}[side]
    return left, left + width, y, y + LINE


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
