"""Figures: curves, heat maps of widths over epochs, and bars of final widths. They need matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastprune.host import atomic
from fastprune.report.log import Line

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; their yellow is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # for more runs than colours
GREY = "#E3E3E3"
ROUND_NUMBERS = partial(MaxNLocator, nbins=8, integer=True, steps=[1, 2, 5, 10])

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "font.size": 9,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.hashsalt": "fastprune",  # the same figure is the same file
    "text.parse_math": False,  # a dollar in the name of a run or layer is a dollar
}


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
        colour, dashes = look(line.number)
        marker = "o" if len(line.x) <= 40 else ""
        axes.plot(line.x, line.y, color=colour, linestyle=dashes, marker=marker, markersize=3, label=line.label)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
    for text, value in (dashed or {}).items():
        axes.axhline(value, color="#555555", linestyle=(0, (5, 3)), linewidth=1, label=text)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(ROUND_NUMBERS())
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.legend(loc="outside lower center", ncols=2 if max(len(line.label) for line in lines) < 40 else 1)
    return figure


def heat_map(title: str, kept: Mapping[str, Mapping[float, float]]) -> Figure:
    """Draw the fraction of each layer's channels that is open, over epochs.

    Args:
        title: the run's label.
        kept: {layer: {epochs done: fraction in [0, 1]}}.
    """
    epochs = sorted({epoch for curve in kept.values() for epoch in curve})
    values = [[curve.get(epoch, float("nan")) for epoch in epochs] for curve in kept.values()]
    figure = Figure(figsize=(6.4, 1.4 + 0.17 * len(kept)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(epochs[0] - 0.5, epochs[-1] + 0.5, len(kept) - 0.5, -0.5),
    )  # fmt: skip
    axes.grid(visible=False)
    axes.set_yticks(range(len(kept)), list(kept), fontsize=7)
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
    bar = 0.8 / len(runs)
    row = max(0.2, 0.13 * len(runs) + 0.06)  # inches
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
