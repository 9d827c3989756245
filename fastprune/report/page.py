"""The page of a report: headline, trade-off, widths, curves, commands and options, in one file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastprune.host.wording import count, milliseconds, percent, points, speed
from fastprune.report.command import commands
from fastprune.report.layers import networks_of, widths_section
from fastprune.report.log import PruningRun
from fastprune.report.look import LOOK
from fastprune.report.outcome import Outcome, Pair, headline, outcome_of
from fastprune.report.tables import as_text
from fastprune.result import measured_where

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
        part: the part of the page that it belongs to.
    """

    name: str
    caption: str
    draw: Draw | None
    note: str = ""
    part: str = "search"


def page(runs: Sequence[PruningRun], found: Sequence[Picture]) -> str:
    """Return the content of ``index.html``; it refers to no other file."""
    names = ", ".join(run.name for run in runs)
    outcomes = [outcome_of(run) for run in runs]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',  # otherwise browsers ask the server for one
        f"<title>Pruning report: {escape(names)}</title>\n<style>{LOOK}</style>\n</head>\n<body>\n<main>",
        *top(runs, outcomes),
        *figures("Trade-off", "trade-off", found),
        *comparison(outcomes),
        *widths(runs, found),
        *figures("Widths compared", "widths_of_several", found),
        *figures("Search", "search", found),
        *figures("Fine-tuning", "finetune", found),
        *figures("Proxies and accuracies", "ranking", found),
        *reproduction(runs),
        *options(runs, found),
        *foot(outcomes),
    ]
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def top(runs: Sequence[PruningRun], outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the headline, and the numbers of a single run before and after."""
    said = headline(outcomes) or ["The search has not finished"]
    network = ", ".join(dict.fromkeys(str(run.config["model"]) for run in runs if run.config.get("model")))
    how = ", ".join(dict.fromkeys(f"{run.method}, {run.config['budget']}" for run in runs)) if len(runs) < 4 else ""
    kicker = " · ".join(filter(None, ["Pruning report", network, how]))
    yield f'<p class="kicker">{escape(kicker)}</p>'
    yield "<h1>" + " ".join(f"<span>{escape(part)}</span>" for part in said) + "</h1>"
    if len(outcomes) == 1:
        tiles = "\n".join(before_and_after(outcomes[0]))
        if tiles:
            yield f'<section class="tiles" aria-label="before and after">\n{tiles}\n</section>'


def before_and_after(outcome: Outcome) -> Iterator[str]:
    """Yield a tile for each number of a run that is known before and after."""
    if outcome.macs is not None:
        yield tile("MACs", percent(outcome.macs[1] / outcome.macs[0]), outcome.macs, count)
    if outcome.params is not None:
        yield tile("parameters", percent(outcome.params[1] / outcome.params[0]), outcome.params, count)
    if outcome.latency is not None:
        yield tile("measured latency", speed(*outcome.latency), outcome.latency, milliseconds)
    elif outcome.modelled is not None:
        yield tile("modelled latency", speed(*outcome.modelled), outcome.modelled, milliseconds)
    if outcome.baseline is not None and outcome.accuracy is not None and outcome.gain is not None:
        what = "test accuracy, not fine-tuned yet"
        if outcome.tuned is not None:
            before = "" if outcome.pruned is None else f" ({percent(outcome.pruned)} before it)"
            what = f"test accuracy after fine-tuning{before}"
        yield tile(what, points(outcome.gain), (outcome.baseline, outcome.accuracy), percent)
    full, last = outcome.top5
    if full is not None and last is not None:
        yield tile("top-5 test accuracy", points(last - full), (full, last), percent)


def tile(what: str, said: str, pair: Pair, show: Callable[[float], str]) -> str:
    """Return a number, its two values, and a bar for each."""
    most = max(pair)
    bars = "".join(
        f'<i class="{kind}" style="width:{100 * value / most:.1f}%"></i>'
        for kind, value in zip(("full", "kept"), pair, strict=True)
    )
    values = " → ".join(show(value) for value in pair)
    return (
        f'<div class="tile"><b>{escape(said)}</b>{escape(values)}<small>{escape(what)}</small>'
        f'<div class="pair" aria-hidden="true">{bars}</div></div>'
    )


def comparison(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the table of several runs."""
    if len(outcomes) < 2:
        return
    rows = [outcome.as_texts() for outcome in outcomes]
    shown = [name for name in rows[0] if any(row[name] != "–" for row in rows)]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in shown)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[shown[0]])}</th>'
        + "".join(f"<td>{keep_units(escape(row[name]))}</td>" for name in shown[1:])
        + "</tr>"
        for row in rows
    )
    yield '<section aria-label="Runs">\n<h2>Runs</h2>'
    yield '<div class="scroll runs" tabindex="0" role="region" aria-label="table of the runs">'
    yield f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n</section>"


def keep_units(text: str) -> str:
    """Return a text in which no line breaks between a number and its unit."""
    return re.sub(r"(?<=\d) (?=[%A-Za-zµ])", "\u00a0", text)


def figures(title: str, part: str, found: Sequence[Picture]) -> Iterator[str]:
    """Yield the drawn figures of one part under its title; nothing if there are none."""
    drawn = [figure(picture) for picture in found if picture.part == part and picture.draw is not None]
    if drawn:
        yield f'<section aria-label="{title}">\n<h2>{title}</h2>\n<div class="grid">'
        yield from drawn
        yield "</div>\n</section>"


def figure(picture: Picture) -> str:
    """Return one figure of the page."""
    assert picture.draw is not None
    inline = import_module("fastprune.report.inline")  # imports matplotlib
    svg = inline.inline_svg(inline.shrink(picture.draw()), picture.name, picture.caption)
    text = " ".join(filter(None, [escape(picture.caption), escape(picture.note)]))
    return f'<figure id="{picture.name}">\n{svg}\n<figcaption>{text}</figcaption>\n</figure>'


def widths(runs: Sequence[PruningRun], found: Sequence[Picture]) -> Iterator[str]:
    """Yield the widths of the layers, network by network."""
    networks = networks_of(runs)
    if not networks:
        return
    yield '<section aria-label="Widths">\n<h2>Widths</h2>'
    yield '<p class="note">Channels that stay in each layer; the outline is the full network.</p>'
    for nth, (layers, plans) in enumerate(networks, start=1):
        yield widths_section(
            f"widths_{nth}", layers, {place: (runs[place].label, plan) for place, plan in plans.items()}
        )
    yield from (f'<p class="note">{escape(p.note)}</p>' for p in found if p.part == "widths" and p.note)
    yield "</section>"


def reproduction(runs: Sequence[PruningRun]) -> Iterator[str]:
    """Yield the commands that make the runs again."""
    yield '<section aria-label="Reproduce">\n<h2>Reproduce</h2>'
    yield '<p class="note">A click selects the whole block.</p>'
    for run in runs if len(runs) <= 3 else ():
        yield command_block(run, title=len(runs) > 1)
    if len(runs) > 3:
        for run in runs:
            yield f"<details><summary>{escape(run.label)}</summary>\n{command_block(run, title=False)}\n</details>"
    yield "</section>"


def command_block(run: PruningRun, *, title: bool) -> str:
    """Return the commands of one run."""
    text = escape("\n".join(commands(run.config, run.finetuning, f"runs/{run.name}")))
    head = f"<h3>{escape(run.label)}</h3>\n" if title else ""
    return f'{head}<pre tabindex="0" aria-label="commands of {escape(run.label)}"><code>{text}</code></pre>'


def options(runs: Sequence[PruningRun], found: Sequence[Picture]) -> Iterator[str]:
    """Yield all settings of the runs and the figures that were not drawn, folded away."""
    yield '<section aria-label="Details">\n<h2>Details</h2>'
    for run in runs:
        settings = {name: value for name, value in run.config.items() if not isinstance(value, dict)}
        settings |= {f"{run.method}.{name}": value for name, value in run.options.items()}
        settings |= {f"finetune.{name}": value for name, value in run.finetuning.items()}
        rows = "\n".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(as_text(value))}</td></tr>'
            for name, value in settings.items()
            if value not in (None, [], "")
        )
        yield f"<details><summary>All settings of {escape(run.label)}</summary>"
        yield f'<div class="scroll"><table><tbody>\n{rows}\n</tbody></table></div></details>'
    left_out = [picture for picture in found if picture.draw is None]
    if left_out:
        items = "".join(f"<li><code>{p.name}</code>: {escape(p.note)}</li>\n" for p in left_out)
        yield f'<details><summary>Figures that were not drawn</summary><ul class="note">\n{items}</ul></details>'
    yield "</section>"


def foot(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield what was measured how, and by which version."""
    places = dict.fromkeys(
        f"{outcome.where.get('name', '')} ({measured_where(outcome.where)})" for outcome in outcomes if outcome.where
    )
    measured = f" Latency: median of forward passes on {escape('; '.join(places))}." if places else ""
    yield f"<footer>fastprune {version('fastprune')}. MACs are multiply-accumulates per sample.{measured}</footer>"
