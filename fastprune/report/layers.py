"""Widths of layers on the page: bars with names, or a profile along the depth of a network of many layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module

from fastprune.graph.plan import PruningPlan
from fastprune.report.log import PruningRun

MOST_BARS = 44
"""Bars that a narrow page shows below one another in 1,200 pixels."""

Plans = Mapping[int, tuple[str, PruningPlan]]
"""{place of the run in the report: its label and its plan}."""


def networks_of(runs: Sequence[PruningRun]) -> list[tuple[dict[str, int], dict[int, PruningPlan]]]:
    """Return the layers of each network, and the plans for it by the place of their run."""
    networks: dict[tuple[tuple[str, int], ...], dict[int, PruningPlan]] = {}
    for place, run in enumerate(runs):
        if run.plan is not None:
            networks.setdefault(tuple(sizes_of(run.plan).items()), {})[place] = run.plan
    return [(dict(layers), plans) for layers, plans in networks.items()]


def sizes_of(plan: PruningPlan) -> dict[str, int]:
    """Return the full width of each layer that can be pruned; of each group for a plan without slices."""
    return {name: size for name, (_, size) in (plan.layers or plan.widths).items()}


def widths_section(name: str, layers: Mapping[str, int], plans: Plans) -> str:
    """Return the widths of one network under some plans."""
    kept = {place: [pair[0] for pair in (plan.layers or plan.widths).values()] for place, (_, plan) in plans.items()}
    labels = {place: label for place, (label, _) in plans.items()}
    legend = "".join(
        f'<li><i style="background:{colour(place)}"></i>{escape(label)}</li>' for place, label in labels.items()
    )
    parts = [f'<ul class="legend">{legend}</ul>']
    if len(layers) * (0.6 + 0.4 * len(plans)) <= MOST_BARS:
        parts.append(bars(name, layers, kept))
    else:
        parts.append(profiles(name, layers, kept, labels))
    parts.append(numbers(layers, kept, labels))
    return "\n".join(parts)


def colour(place: int) -> str:
    """Return the colour of a run, as in all figures."""
    return f"var(--series{place % 7})"


def bars(name: str, layers: Mapping[str, int], kept: Mapping[int, Sequence[int]]) -> str:
    """Return a bar for each layer: the outline is its full width."""
    most = max(layers.values())
    rows = []
    for nth, (layer, size) in enumerate(layers.items()):
        fills = "".join(
            f'<i style="width:{100 * widths[nth] / size:.1f}%;background:{colour(place)}"></i>'
            for place, widths in kept.items()
        )
        values = ", ".join(str(widths[nth]) for widths in kept.values())
        number = f"{values} of {size}" if len(kept) == 1 else f"{size}"
        rows.append(
            f'<li title="{escape(layer)}: {values} of {size}"><span class="name"><bdi>{escape(layer)}</bdi></span>'
            f'<span class="track" style="width:{100 * size / most:.1f}%">{fills}</span>'
            f'<span class="number">{number}</span></li>'
        )
    return (
        f'<ul class="bars" id="{name}" aria-label="channels that stay in each layer">\n' + "\n".join(rows) + "\n</ul>"
    )


def profiles(name: str, layers: Mapping[str, int], kept: Mapping[int, Sequence[int]], labels: Mapping[int, str]) -> str:
    """Return the profile of a deep network, drawn for wide and for narrow pages."""
    inline, plots = import_module("fastprune.report.inline"), import_module("fastprune.report.plots")
    runs = {labels[place]: widths for place, widths in kept.items()}
    caption = f"Channels that stay along {len(layers)} layers, in front of those of the full network."
    drawn = []
    for kind, size in (("wide", (9.2, 3.0)), ("narrow", (4.6, 3.0))):
        figure = plots.profile(layers, runs, list(kept))
        figure.legends[0].remove()  # the page has one
        figure.set_size_inches(*size)
        drawn.append(f'<div class="{kind}">{inline.inline_svg(figure, f"{name}_{kind}", caption)}</div>')
    return f'<figure id="{name}">\n{"".join(drawn)}\n<figcaption>{escape(caption)}</figcaption>\n</figure>'


def numbers(layers: Mapping[str, int], kept: Mapping[int, Sequence[int]], labels: Mapping[int, str]) -> str:
    """Return a folded table of all widths."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("layer", "channels", *labels.values()))
    rows = "\n".join(
        f'<tr><th scope="row">{escape(layer)}</th><td>{size}</td>'
        + "".join(f"<td>{widths[nth]}</td>" for widths in kept.values())
        + "</tr>"
        for nth, (layer, size) in enumerate(layers.items())
    )
    return (
        f"<details><summary>All {len(layers)} layers in numbers</summary>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="widths of all layers">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></details>"
    )
