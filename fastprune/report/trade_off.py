"""The trade-off: accuracy over cost, or over throughput as in Fig. 1 of GCP (Khetan and Karnin), of several runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastprune.report.outcome import Outcome, Pair
from fastprune.report.page import Picture

AXES = {
    "macs": ("trade_off_macs", "MACs", 1e6, "millions of MACs"),
    "latency": ("trade_off_latency", "measured latency", 1.0, "measured latency of a forward pass in ms"),
    "throughput": ("trade_off_throughput", "throughput", 1.0, "images per second"),
}
"""{attribute of an outcome: name of the figure, words, size of a unit, label of the axis}."""


def trade_off_picture(outcomes: Sequence[Outcome], what: str, plots: Any) -> Picture:
    """Return accuracy over a cost, without the runs that do not know both.

    Args:
        outcomes: the runs.
        what: a key of ``AXES``.
        plots: the module that draws.
    """
    name, words, *_ = AXES[what]
    known = known_outcomes(outcomes, what)
    absent = [outcome.name for outcome in outcomes if outcome not in known]
    note = f"Left out: {', '.join(absent)} ({words} or accuracy not measured)." if absent else ""
    batches = {int(o.where["batch"]) for o in known if o.where and o.throughput} if what == "throughput" else set()
    at = (
        f" at {'a batch' if len(batches) == 1 else 'batches'} of {' and '.join(map(str, sorted(batches)))}"
        if batches
        else ""
    )
    paper = " (GCP, Fig. 1)" if what == "throughput" else ""
    caption = f"Accuracy over {words}{at}; diamonds are full networks{paper}."
    if len(known) < 2:
        return Picture(name, caption, None, note, "trade-off")
    return Picture(name, caption, partial(plots.trade_offs, chart(known, what, plots)), note, "trade-off")


def known_outcomes(outcomes: Sequence[Outcome], what: str) -> list[Outcome]:
    """Return the runs whose accuracy and cost are known."""
    return [outcome for outcome in outcomes if _cost(outcome, what) and outcome.accuracy is not None]


def chart(known: Sequence[Outcome], what: str, plots: Any) -> Any:
    """Return the chart of accuracy over a cost, a ``plots.TradeOff``."""
    _, _, unit, x_label = AXES[what]
    families = list(dict.fromkeys(outcome.method for outcome in known))
    points = [
        plots.Point(families.index(o.method), o.name, _cost(o, what)[1] / unit, o.pruned, o.accuracy) for o in known
    ]
    baseline = _baseline(known, what, unit)
    networks = {} if baseline else _networks(known, what, unit)
    return plots.TradeOff(points, families, baseline, x_label, networks, joined=what != "throughput")


def _cost(outcome: Outcome, what: str) -> Any:
    pair: Pair | None = getattr(outcome, what)
    return pair


def _baseline(known: Sequence[Outcome], what: str, unit: float) -> tuple[float, float] | None:
    """Return cost and accuracy of the full network; None if the runs began with different ones."""
    accuracies = {outcome.baseline for outcome in known if outcome.baseline is not None}
    costs = sorted(_cost(outcome, what)[0] for outcome in known)
    same_network = len({outcome.macs[0] for outcome in known if outcome.macs}) <= 1
    if len(accuracies) != 1 or not same_network:
        return None
    return costs[len(costs) // 2] / unit, accuracies.pop()  # measured times differ a little: their median


def _networks(known: Sequence[Outcome], what: str, unit: float) -> dict[str, tuple[float, float]]:
    """Return cost and accuracy of the different full networks by name, those that have a name and an accuracy."""
    found: dict[str, list[Outcome]] = {}
    for outcome in known:
        if outcome.model and outcome.baseline is not None:
            found.setdefault(outcome.model, []).append(outcome)
    return {
        name: (statistics.median(_cost(o, what)[0] for o in own) / unit, own[0].baseline)
        for name, own in found.items()
        if len({outcome.baseline for outcome in own}) == 1 and own[0].baseline is not None
    }
