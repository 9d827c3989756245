"""The report of pruning runs: a folder with figures, and a static page with the figures and the runs' numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.graph.plan import PruningPlan
from fastprune.host import atomic
from fastprune.report.log import Metric, Over, PruningRun, lines, number
from fastprune.report.tables import as_text, millions, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure"]


@dataclass(frozen=True)
class Picture:
    """One figure of the report.

    Args:
        name: the name of its files.
        caption: what it shows.
        draw: a function that draws it; None if no run has the data.
        note: why it, or some run in it, is left out; "" if none is.
    """

    name: str
    caption: str
    draw: Draw | None
    note: str = ""


def write_report(runs: Sequence[PruningRun], folder: Path) -> list[Picture]:
    """Write the figures (PNG and SVG) and ``index.html`` into a folder, over those of an earlier report.

    Returns:
        All figures, those that were left out too.

    Raises:
        ValueError: without matplotlib; says how to get it.
    """
    plots = import_plots()
    found = list(pictures(runs, plots))  # refuses wrong logs before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    with plots.style():
        for picture in found:
            if picture.draw is not None:
                plots.save(picture.draw(), folder, picture.name)
    atomic.write_text(folder / "index.html", page(runs, found))
    return found


def import_plots() -> Any:
    """Import the module that draws."""
    try:
        return importlib.import_module("fastprune.report.plots")
    except ImportError as error:
        raise ValueError(f"a report needs matplotlib: pip install 'fastprune[report]' ({error})") from error


def pictures(runs: Sequence[PruningRun], plots: Any) -> Iterator[Picture]:
    """Yield all figures of a report, drawn or not."""

    def curves(
        name: str, caption: str, metric: str | Metric, y_label: str, over: Over = "epochs", **looks: Any
    ) -> Picture:
        metric_of: Metric = (lambda _: metric) if isinstance(metric, str) else metric
        drawn = lines(runs, metric_of, over)
        absent = [run for run in runs if not run.curve(metric_of(run))]
        draw = partial(plots.curves, drawn, f"{over} of the search", y_label, **looks) if drawn else None
        return Picture(name, caption, draw, missing_text(absent, "logged no such metric"))

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
    yield curves(
        "alignment_gap",
        "Alignment gap: held-out accuracy with all channels, minus that without the channels to be pruned.",
        "alignment_gap", "accuracy lost at the cut", percent=True,
    )  # fmt: skip
    yield from heat_maps(runs, plots)
    yield from bars(runs, plots)


def heat_maps(runs: Sequence[PruningRun], plots: Any) -> Iterator[Picture]:
    """Yield the widths over epochs, one figure for each run."""
    for nth, run in enumerate(runs, start=1):
        name = "keep_over_epochs" if len(runs) == 1 else f"keep_over_epochs_{nth}"
        caption = f"Channels that the hard gates keep in each layer after each epoch: {run.label}."
        kept = run.kept
        draw = partial(plots.heat_map, run.label, kept) if kept else None
        yield Picture(name, caption, draw, missing_text([] if kept else [run], "logged no widths"))


def bars(runs: Sequence[PruningRun], plots: Any) -> Iterator[Picture]:
    """Yield the final widths, one figure for all runs of the same network."""
    networks: dict[tuple[tuple[str, int], ...], dict[int, PruningPlan]] = {}
    for place, run in enumerate(runs):
        if run.plan is not None:
            networks.setdefault(tuple(run.plan.groups.items()), {})[place] = run.plan
    note = missing_text([run for run in runs if run.plan is None], "has no plan yet")
    caption = "Widths of the plan: channels that stay in each layer, of all that could go."
    if not networks:
        yield Picture("widths", caption, None, note)
    for nth, (layers, plans) in enumerate(networks.items(), start=1):
        kept = {runs[place].label: [kept for kept, _ in plan.widths.values()] for place, plan in plans.items()}
        name = "widths" if len(networks) == 1 else f"widths_{nth}"
        yield Picture(name, caption, partial(plots.widths, dict(layers), kept, list(plans)), note if nth == 1 else "")


def missing_text(runs: Sequence[PruningRun], reason: str) -> str:
    """Return a sentence on the runs that a figure lacks."""
    return f"Left out: {', '.join(run.label for run in runs)} ({reason})." if runs else ""


# --- the page ---------------------------------------------------------------------------------------------------------

LOOK = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e3e3e3; }
tbody th { font-weight: normal; color: #555; white-space: nowrap; }
tr.part th { font-weight: 600; color: #1a1a1a; padding-top: 1rem; }
figure { margin: 2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; max-width: 46rem; }
"""


def page(runs: Sequence[PruningRun], found: Sequence[Picture]) -> str:
    """Return the content of ``index.html``."""
    names = ", ".join(run.name for run in runs)
    left_out = [picture for picture in found if picture.draw is None]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Pruning report: {escape(names)}</title>\n<style>{LOOK}</style>\n</head>\n<body>",
        f"<h1>Pruning report: {escape(names)}</h1>",
        table(runs),
        *(figure(picture) for picture in found if picture.draw is not None),
    ]
    if left_out:
        items = "".join(f"<li><code>{p.name}</code>: {escape(p.note)}</li>\n" for p in left_out)
        parts.append(f'<h2>Figures that were not drawn</h2>\n<ul class="note">\n{items}</ul>')
    return "\n".join([*parts, "</body>\n</html>\n"])


def figure(picture: Picture) -> str:
    """Return one figure of the page."""
    caption = escape(picture.caption)
    text = " ".join(filter(None, [caption, escape(picture.note)]))
    files = f'<a href="{picture.name}.png">PNG</a>, <a href="{picture.name}.svg">SVG</a>'
    image = f'<img src="{picture.name}.svg" alt="{caption}">'
    return f'<figure id="{picture.name}">\n{image}\n<figcaption>{text} ({files})</figcaption>\n</figure>'


def table(runs: Sequence[PruningRun]) -> str:
    """Return a table of the runs' numbers and options, one column for each run."""
    columns = [{"Run": run_facts(run), "Result": results(run), "Options": options(run)} for run in runs]
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = []
    for part in columns[0]:
        rows.append(f'<tr class="part"><th colspan="{len(runs) + 1}">{part}</th></tr>')
        for fact in dict.fromkeys(fact for column in columns for fact in column[part]):
            cells = "".join(f"<td>{escape(column[part].get(fact, '–'))}</td>" for column in columns)
            rows.append(f"<tr><th>{escape(fact)}</th>{cells}</tr>")
    body = "\n".join(rows)
    head = f"<thead><tr><th></th>{heads}</tr></thead>"
    return f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table></div>'


def run_facts(run: PruningRun) -> dict[str, str]:
    """Return the settings of a run."""
    facts = {"method": run.method, "budget": run.config["budget"]}
    facts |= {name: run.config.get(name) for name in ("model", "weights", "from_run", "data", "seed", "precision")}
    return {name.replace("_", " "): as_text(value) for name, value in facts.items() if value is not None}


def results(run: PruningRun) -> dict[str, str]:
    """Return the results: sizes from the plan, accuracies from the lines "result" of the log."""
    pruned, tuned, done = run.last("result", run.method), run.last("result", "finetune"), run.last("plan")
    accuracies = {
        "test accuracy before": number(pruned, "baseline", "accuracy"),
        "test accuracy after pruning": number(pruned, "compact", "accuracy"),
        "test accuracy after fine-tuning": number(tuned, "compact", "accuracy"),
    }
    facts = {name: percent(value) for name, value in accuracies.items() if value is not None}
    if run.plan is not None:
        facts |= {"MACs": change_text(*run.plan.macs), "parameters": change_text(*run.plan.params)}
    full, planned, seconds = number(done, "ms", "full"), number(done, "ms", "planned"), number(done, "seconds")
    if full is not None and planned is not None:
        facts["latency (modelled)"] = f"{full:.2f} ms → {planned:.2f} ms"
    if seconds is not None:
        facts["search and surgery"] = f"{seconds:,.0f} s"
    return facts or {"plan": "not finished"}


def change_text(full: int, planned: int) -> str:
    """Return two sizes, and the second as a percentage of the first."""
    return f"{millions(full)} → {millions(planned)} ({percent(planned / full)})"


def options(run: PruningRun) -> dict[str, str]:
    """Return the options of the run's method."""
    return {name.replace("_", " "): as_text(value) for name, value in run.options.items()}


def summary(found: Sequence[Picture]) -> Mapping[str, Any]:
    """Return which figures were drawn and which were left out, as JSON values."""
    return {
        "figures": [picture.name for picture in found if picture.draw is not None],
        "left_out": {picture.name: picture.note for picture in found if picture.draw is None},
    }
