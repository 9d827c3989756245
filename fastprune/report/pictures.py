"""The figures of a report: which there are, which have data, and the folder they are written to with the page."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastprune.graph.plan import PruningPlan
from fastprune.host import atomic
from fastprune.report.log import Metric, Over, PruningRun, lines
from fastprune.report.outcome import outcome_of
from fastprune.report.page import Picture, page
from fastprune.report.paper_pictures import ranking_pictures, search_pictures, width_pictures
from fastprune.report.proxy_ranking import Ranking
from fastprune.report.trade_off import known_outcomes, trade_off_picture


def write_report(runs: Sequence[PruningRun], folder: Path, ranking: Sequence[Ranking] = ()) -> list[Picture]:
    """Write the figures (PNG and SVG) and ``index.html`` into a folder, over those of an earlier report.

    The page needs no other file: figures are part of it.

    Args:
        runs: the runs.
        folder: the folder.
        ranking: proxies and accuracies of networks, from a file.

    Returns:
        All figures, those that were left out too.

    Raises:
        ValueError: without matplotlib; says how to get it.
    """
    found = write_pictures(runs, folder, ranking)
    with import_plots().style():
        atomic.write_text(folder / "index.html", page(runs, found))
    return found


def write_pictures(runs: Sequence[PruningRun], folder: Path, ranking: Sequence[Ranking] = ()) -> list[Picture]:
    """Write the figures without the page; without runs, only those of ``ranking``. See ``write_report``."""
    plots = import_plots()
    # A wrong log is refused before anything is written.
    found = list(pictures(runs, plots, ranking) if runs else ranking_pictures((), ranking))
    folder.mkdir(parents=True, exist_ok=True)
    with plots.style():
        for picture in found:
            if picture.draw is not None:
                plots.save(picture.draw(), folder, picture.name)
    return found


def import_plots() -> Any:
    """Import the module that draws."""
    try:
        return importlib.import_module("fastprune.report.plots")
    except ImportError as error:
        raise ValueError(f"a report needs matplotlib: pip install 'fastprune[report]' ({error})") from error


def pictures(runs: Sequence[PruningRun], plots: Any, ranking: Sequence[Ranking] = ()) -> Iterator[Picture]:
    """Yield all figures of a report, drawn or not."""

    def curves(
        name: str, caption: str, metric: str | Metric, y_label: str, over: Over = "epochs", **looks: Any
    ) -> Picture:
        metric_of: Metric = (lambda _: metric) if isinstance(metric, str) else metric
        drawn = lines(runs, metric_of, over)
        absent = [run for run in runs if not run.curve(metric_of(run))]
        has_curve = any(len(line.x) > 1 for line in drawn)
        draw = partial(plots.curves, drawn, f"{over} of the search", y_label, **looks) if has_curve else None
        single = [runs[line.number] for line in drawn] if drawn and not has_curve else []
        notes = [
            missing_text(absent, "logged no such metric"),
            missing_text(single, "logged it once, which is no curve"),
        ]
        return Picture(name, caption, draw, " ".join(filter(None, notes)), "search")

    yield from trade_offs(runs, plots)
    budgets = {f"budget {run.budget}": run.budget_part for run in runs}
    yield curves(
        "proxy_accuracy",
        "Proxy accuracy: held-out accuracy of the network that the hard gates leave, before any fine-tuning.",
        "proxy_accuracy", "proxy accuracy (top 1)", percent=True,
    )  # fmt: skip
    yield curves(
        "regulariser",
        "Regulariser R: how far the cost is from the budget, as the method measures it, before its weight λ.",
        "regulariser", "regulariser R",
    )  # fmt: skip
    yield curves(
        "resource_ratio",
        "Cost of the network during the search, as a fraction of the full cost; dashed: the budget.",
        lambda run: f"{run.budget.resource}_ratio", "cost (fraction of the full network's)", percent=True,
        dashed={text: part for text, part in budgets.items() if part is not None},
    )  # fmt: skip
    yield curves(
        "randomness",
        "Gate randomness s = mean |θ − ½|: at ½ all gates are decided, at 0 each is a coin toss.",
        "randomness", "s = mean |θ − ½|", over="steps",
    )  # fmt: skip
    if any(run.curve("alignment_gap") for run in runs):  # only SANP has one
        yield curves(
            "alignment_gap",
            "Alignment gap: held-out accuracy with all channels, minus that without the channels to be pruned.",
            "alignment_gap", "accuracy lost at the cut", percent=True,
        )  # fmt: skip
    yield from search_pictures(runs)
    yield from heat_maps(runs, plots)
    yield from tunings(runs, plots)
    yield from bars(runs, plots)
    yield from width_pictures(runs)
    yield from ranking_pictures(runs, ranking)


def trade_offs(runs: Sequence[PruningRun], plots: Any) -> Iterator[Picture]:
    """Yield accuracy over cost, if there are runs to compare."""
    found = [outcome_of(run) for run in runs]
    if len(found) > 1:
        for what in ("macs", "latency", "throughput"):
            if what == "throughput" and len(known_outcomes(found, what)) < 2:
                continue  # what is missing is said for the latency
            yield trade_off_picture(found, what, plots)


def tunings(runs: Sequence[PruningRun], plots: Any) -> Iterator[Picture]:
    """Yield the curves of the fine-tunings; none if no run has been fine-tuned for more than one epoch."""
    for metric, name, y_label, percent in (
        ("held_out_accuracy", "finetuning_accuracy", "held-out accuracy", True),
        ("loss", "finetuning_loss", "training loss", False),
    ):
        curves = {place: run.tuning(metric) for place, run in enumerate(runs)}
        drawn = [
            plots.Line(place, runs[place].label, list(curve), list(curve.values()))
            for place, curve in curves.items()
            if len(curve) > 1
        ]
        if drawn:
            draw = partial(plots.curves, drawn, "epochs of the fine-tuning", y_label, percent=percent)
            absent = [run for place, run in enumerate(runs) if len(curves[place]) < 2]
            caption = f"Fine-tuning: {y_label} after each epoch."
            yield Picture(name, caption, draw, missing_text(absent, "has no such curve"), "finetune")


def heat_maps(runs: Sequence[PruningRun], plots: Any) -> Iterator[Picture]:
    """Yield the widths over epochs, one figure for each run."""
    for nth, run in enumerate(runs, start=1):
        name = "keep_over_epochs" if len(runs) == 1 else f"keep_over_epochs_{nth}"
        caption = f"Channels that the hard gates keep in each layer after each epoch: {run.label}."
        kept = run.kept
        epochs = len({epoch for curve in kept.values() for epoch in curve})
        draw = partial(plots.heat_map, run.label, kept) if epochs > 1 else None
        why = "logged no widths" if not kept else "logged widths once"
        yield Picture(name, caption, draw, missing_text([] if epochs > 1 else [run], why), "search")


def bars(runs: Sequence[PruningRun], plots: Any) -> Iterator[Picture]:
    """Yield the final widths, one figure for all runs of the same network."""
    networks: dict[tuple[tuple[str, int], ...], dict[int, PruningPlan]] = {}
    for place, run in enumerate(runs):
        if run.plan is not None:
            networks.setdefault(tuple(run.plan.groups.items()), {})[place] = run.plan
    note = missing_text([run for run in runs if run.plan is None], "has no plan yet")
    caption = "Widths of the plan: channels that stay in each layer, of all that could go."
    if not networks:
        yield Picture("widths", caption, None, note, "widths")
    for nth, (layers, plans) in enumerate(networks.items(), start=1):
        kept = {runs[place].label: [kept for kept, _ in plan.widths.values()] for place, plan in plans.items()}
        name = "widths" if len(networks) == 1 else f"widths_{nth}"
        draw = partial(plots.widths, dict(layers), kept, list(plans))
        yield Picture(name, caption, draw, note if nth == 1 else "", "widths")


def summary(found: Sequence[Picture]) -> Mapping[str, Any]:
    """Return which figures were drawn and which were left out, as JSON values."""
    return {
        "figures": [picture.name for picture in found if picture.draw is not None],
        "left_out": {picture.name: picture.note for picture in found if picture.draw is None},
    }


def missing_text(runs: Sequence[PruningRun], reason: str) -> str:
    """Return a sentence on the runs that a figure lacks."""
    return f"Left out: {', '.join(run.label for run in runs)} ({reason})." if runs else ""
