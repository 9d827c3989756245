"""Widths by place in the block: those of the first layers of all blocks, of the second ones, …; and by budget.

The first are after Fig. 5 and 6 of SP (Zhang and Ou), which show top, middle and bottom layers of ResNet-50's blocks.
The second are after Fig. 3 of DDNP (Gao et al., ECCV 2022), which compares two methods at two budgets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastprune.graph.plan import PruningPlan
from fastprune.report.differences import group_by_budget, name_runs
from fastprune.report.layers import networks_of
from fastprune.report.log import PruningRun, group_by_seed

LEAST_BLOCKS = 3
"""Blocks with a layer at the same place that make a panel."""

BLOCK = re.compile(r"(?P<block>.*\b\d+)\.(?P<place>[^.\d][^.]*(\..*)?)")
"""A layer's name: the block ends with the last number that is followed by a word."""


@dataclass(frozen=True)
class Widths:
    """The widths of some layers, in one panel.

    Args:
        title: its title: the end of the layers' names, or the budget.
        full: the full widths, from the image to the classes.
        kept: {label: (number of the label, widths that stay)}.
    """

    title: str
    full: list[int]
    kept: dict[str, tuple[int, list[int]]]


def split_name(layer: str) -> tuple[str, str] | None:
    """Return the block and the place of a layer; None if its name has no block.

    >>> split_name("layer1.0.conv2"), split_name("features.3.conv.0.0"), split_name("conv1")
    (('layer1.0', 'conv2'), ('features.3', 'conv.0.0'), None)
    """
    found = BLOCK.fullmatch(layer)
    return (found["block"], found["place"]) if found else None


def block_widths(runs: Sequence[PruningRun]) -> list[list[Widths]]:
    """Return the widths of each network of the runs by place; without places that fewer than three blocks have.

    Places at which every run keeps all channels are left out. Of runs that differ in the seed only the first counts.
    """
    firsts = [family[0] for family in group_by_seed(runs)]
    labels = dict(zip(map(runs.index, firsts), name_runs(firsts), strict=True))
    found = []
    for layers, plans in networks_of(runs):
        kept = {labels[place]: (place, _widths_of(plan)) for place, plan in plans.items() if place in labels}
        panels = [
            Widths(place, [layers[layer] for layer in members], _select(kept, members))
            for place, members in places_of(layers).items()
            if len(members) >= LEAST_BLOCKS and _shrinking(layers, members, kept)
        ]
        if panels:
            found.append(panels)
    return found


def places_of(layers: Sequence[str] | Mapping[str, int]) -> dict[str, list[str]]:
    """Return {place: its layers, one for each block}."""
    members: dict[str, list[str]] = {}
    for layer in layers:
        split = split_name(layer)
        if split is not None:
            members.setdefault(split[1], []).append(layer)
    return members


def budget_widths(runs: Sequence[PruningRun]) -> list[list[Widths]]:
    """Return the widths of each network of the runs by budget, if several settings and several budgets compare.

    Layers of which every run keeps all channels are left out. Of runs that differ in the seed only the first counts.
    """
    found = []
    for layers, plans in networks_of(runs):
        kept = {
            title: {s.label: (s.number, _widths_of(s.runs[0].plan)) for s in settings if s.runs[0].plan}
            for title, settings in group_by_budget([runs[place] for place in plans]).items()
        }
        everything = {f"{title}, {label}": own for title, panel in kept.items() for label, own in panel.items()}
        members = _shrinking(layers, list(layers), everything)
        full = [layers[layer] for layer in members]
        if len(kept) > 1 and max(map(len, kept.values())) > 1 and members:
            found.append([Widths(title, full, _select(own, members)) for title, own in kept.items()])
    return found


Kept = Mapping[str, tuple[int, Mapping[str, int]]]
"""{label: (its number, widths that stay by layer)}."""


def _widths_of(plan: PruningPlan) -> dict[str, int]:
    return {layer: kept for layer, (kept, _) in (plan.layers or plan.widths).items()}


def _select(kept: Kept, layers: Sequence[str]) -> dict[str, tuple[int, list[int]]]:
    return {label: (number, [widths[layer] for layer in layers]) for label, (number, widths) in kept.items()}


def _shrinking(full: Mapping[str, int], layers: Sequence[str], kept: Kept) -> list[str]:
    """Return the layers of which some run keeps less than all channels."""
    return [layer for layer in layers if any(widths[layer] < full[layer] for _, widths in kept.values())]
