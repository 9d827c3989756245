"""The chart of a sensitivity: accuracy, or loss, over the part of each group that stays. It needs matplotlib."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fastprune.host import atomic
from fastprune.report.plots import COLOURS, GREY, style
from fastprune.sensitivity import Sensitivity

COLUMNS = 5
MOST = 40  # panels; of more groups those that cost most are drawn


def draw_sensitivity(found: Sensitivity, path: Path) -> None:
    """Write a PNG with a small panel for each group, in the order of the network; of too many, those that cost most."""
    names = list(dict.fromkeys(point.group for point in found.points))
    worst = sorted(names, key=lambda name: -max(found.lost(point) for point in found.of_group(name)))[:MOST]
    names = [name for name in names if name in worst]
    rows = math.ceil(len(names) / COLUMNS)
    with style():
        figure = Figure(figsize=(1.7 * COLUMNS, 0.6 + 1.25 * rows), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
        for place in axes[len(names) :]:
            place.set_visible(False)
        for place, name in zip(axes, names, strict=False):
            points = found.of_group(name)
            place.axhline(found.value, color="#999999", linewidth=0.8)
            place.plot(
                [*(p.kept / p.size for p in points), 1], [*(p.value for p in points), found.value],
                color=COLOURS[0], marker="o", markersize=2.5,
            )  # fmt: skip
            place.set_title(name if len(name) <= 22 else f"…{name[-21:]}", fontsize=7)
            place.set_xlim(0, 1.03)
            place.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            if found.accuracy is not None:
                place.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            place.tick_params(labelsize=6, color=GREY)
        figure.supxlabel("part of the group that stays", fontsize=8)
        figure.supylabel(f"held-out {found.measure}", fontsize=8)
        atomic.write(path, partial(figure.savefig, format="png"))
