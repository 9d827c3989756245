"""The pictures of a report after figures of the papers, beside those in ``pictures``; docs/reports.md has the table.

Each is there only if some run has its data: they belong to some methods, or compare several runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fastprune.report.block_widths import block_widths, budget_widths
from fastprune.report.differences import compare_by_budget
from fastprune.report.gate_training import cost_terms, mask_edges, trainings
from fastprune.report.log import PruningRun
from fastprune.report.page import Picture
from fastprune.report.proxy_ranking import Ranking, rank_runs


def import_panels() -> Any:
    """Import the module that draws; only after ``pictures.import_plots``, which says what is missing."""
    return importlib.import_module("fastprune.report.panels")


def search_pictures(runs: Sequence[PruningRun]) -> Iterator[Picture]:
    """Yield pictures of the searches."""
    panels = import_panels()
    if compared := compare_by_budget(runs, "proxy_accuracy"):
        yield _picture(
            "settings",
            "Proxy accuracy by what differs between the runs, budget by budget; lines are means over seeds, bands "
            "reach from the least to the greatest (DDNP, Fig. 4).",
            compared,
            lambda some: panels.compared(some, "epochs of the search", "proxy accuracy (top 1)"),
        )
    if trained := trainings(runs):
        yield _picture(
            "accuracy_and_regulariser",
            "Held-out accuracy under the hard gates, and the regulariser R: first R falls, and accuracy with it; then "
            "accuracy recovers at R near 0 (DMC, Fig. 5 a–d).",
            trained,
            panels.accuracy_and_regulariser,
        )
    if terms := cost_terms(runs):
        yield _picture(
            "cost_term",
            "Value and slope of the regulariser R by distance from the target p of the cost ratio r of the layers with "
            "gates, and the searches on it (DMC, Fig. 2).",
            terms,
            panels.cost_terms,
        )
    if edges := mask_edges(runs):
        yield _picture(
            "mask_edge",
            "Mask of the largest group by the rank of its channels, at the last width of the search, without a closing "
            "of the edge; dashed: without a soft edge (DDNP, Fig. 2).",
            edges,
            panels.mask_edges,
        )


def width_pictures(runs: Sequence[PruningRun]) -> Iterator[Picture]:
    """Yield widths by budget and by place in the block, pictures of their own for each network."""
    for name, networks, step, caption in (
        (
            "budget_widths",
            budget_widths(runs),
            "layer",
            "Channels that stay in each layer, from the image to the classes, by what differs between the runs, budget "
            "by budget (DDNP, Fig. 3).",
        ),
        (
            "block_widths",
            block_widths(runs),
            "block",
            "Channels that stay in the layers at the same place of all blocks, from the image to the classes (SP, Fig. "
            "5 and 6).",
        ),
    ):
        for nth, found in enumerate(networks, start=1):
            own = name if len(networks) == 1 else f"{name}_{nth}"
            yield _picture(own, caption, found, partial(import_panels().widths, x_label=step), part="widths_of_several")


def ranking_pictures(runs: Sequence[PruningRun], read: Sequence[Ranking] = ()) -> Iterator[Picture]:
    """Yield accuracies over proxies, of runs and of networks that were read from a file."""
    for name, found in (("proxy_ranking", rank_runs(runs)), ("proxy_ranking_of_file", list(read))):
        if found:
            yield _picture(
                name,
                "Accuracy after training over what a search chooses by, its proxy, with Spearman's rank correlation ρ; "
                "a loss ranks well if ρ is near −1. Bars reach over the seeds (SP, Fig. 4).",
                found,
                import_panels().rankings,
                part="ranking",
            )


def _picture(name: str, caption: str, found: Sequence[Any], draw: Any, part: str = "search") -> Picture:
    """Return a picture of as many panels as fit."""
    most = import_panels().MOST
    note = f"The first {most} of {len(found)} are shown." if len(found) > most else ""
    return Picture(name, caption, partial(draw, found[:most]), note, part)
