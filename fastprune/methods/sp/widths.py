"""Sub-networks that keep the first channels of each group: their widths, their masks, and the final plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.methods.contract import Task
from fastprune.planning.budget import TOLERANCE
from fastprune.planning.fitting import fit

LEAST, STEP = 0.10, 0.03  # 31 ratios from 0.10 to 1

Widths = tuple[int, ...]
"""The kept units of each group; or the choices of one group, ascending."""


def width_choices(task: Task, groups: Sequence[int]) -> tuple[Widths, ...]:
    """Return the choices of each group's width: 31 fractions of its units, from a tenth to all, within the limits."""
    allowed = task.limits.widths(task.graph)
    ratios = np.append(np.arange(LEAST, 1 - STEP / 2, STEP), 1.0)
    choices = []
    for g in groups:
        widths = allowed[g]
        rounded = [widths.at_most(max(1, int(ratio * widths.size + 1e-9))) for ratio in ratios]
        choices.append(tuple(sorted({min(max(w, widths.least), widths.most) for w in rounded})))
    return tuple(choices)


def random_widths(choices: Sequence[Widths], rng: torch.Generator) -> Widths:
    """Draw one of its choices for each group."""
    return tuple(widths[int(torch.randint(len(widths), (), generator=rng))] for widths in choices)


def smallest_widths(choices: Sequence[Widths]) -> Widths:
    """Return the smallest choice of each group."""
    return tuple(widths[0] for widths in choices)


def first_units(graph: ChannelGraph, groups: Sequence[int], widths: Sequence[int]) -> Tensor:
    """Return the mask that keeps the first ``widths`` units of ``groups`` and all units of other groups, bool [U]."""
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    for g, width in zip(groups, widths, strict=True):
        group = graph.groups[g]
        mask[group.start + width : group.start + group.size] = False
    return mask


def fit_widths(task: Task, mask: Tensor, prunable: Tensor) -> Tensor:
    """Change a mask of ``first_units`` to meet the budget: add or remove some units in their order.

    If the next unit of every group costs too much, and more than 1 % of the full cost is left, one group becomes wider
    and the others become narrower by its cost.

    Args:
        task: the task with graph, budget and limits.
        mask: the chosen units, bool [U].
        prunable: the prunable units, bool [U].
    """
    meter = task.budget.meter(task.graph)
    full, limit = float(meter(torch.ones(task.graph.num_units))), task.budget.limit(task.graph)
    masks = [fit_in_order(task, mask, prunable)]
    if limit - float(meter(masks[0])) > TOLERANCE * full:
        for group, widths in zip(task.graph.groups, task.limits.widths(task.graph), strict=True):
            wider = masks[0].clone()
            width = int(wider[group.units].sum())
            wider[group.start : group.start + min(group.size, width + widths.step)] = True
            masks.append(fit_in_order(task, wider, prunable))
    return max(masks, key=lambda kept: float(meter(kept)))


def fit_in_order(task: Task, mask: Tensor, prunable: Tensor) -> Tensor:
    """Keep the units of a mask [U], then the others, from the first of each group on, up to the budget."""
    scores = torch.where(mask, 2.0, 0.0).double()
    for group in task.graph.groups:
        scores[group.units] -= torch.arange(group.size).double() / group.size
    return fit(task.graph, task.budget, scores, prunable=prunable, limits=task.limits)


def group_units(graph: ChannelGraph, groups: Sequence[int]) -> Tensor:
    """Return the units of groups, bool [U]."""
    units = torch.zeros(graph.num_units, dtype=torch.bool)
    for g in groups:
        units[graph.groups[g].units] = True
    return units
