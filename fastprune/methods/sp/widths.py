"""Sub-networks that keep the first channels of each group: which widths there are, their masks, and the final plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.methods.contract import Task
from fastprune.planning.budget import TOLERANCE
from fastprune.planning.fitting import fit

LEAST, STEP = 0.10, 0.03  # of the ratios: 31 from 0.10 to 1

Widths = tuple[int, ...]  # kept units, or the choices of one group, ascending


def choices_of(task: Task, groups: Sequence[int]) -> tuple[Widths, ...]:
    """The widths that each group may have: 31 parts of its units, from a tenth to all, as far as the limits allow."""
    allowed = task.limits.widths(task.graph)
    ratios = np.append(np.arange(LEAST, 1 - STEP / 2, STEP), 1.0)
    found = []
    for g in groups:
        widths = allowed[g]
        wanted = [widths.at_most(max(1, int(ratio * widths.size + 1e-9))) for ratio in ratios]
        found.append(tuple(sorted({min(max(w, widths.least), widths.most) for w in wanted})))
    return tuple(found)


def random_widths(choices: Sequence[Widths], rng: torch.Generator) -> Widths:
    """One of its widths for each group."""
    return tuple(widths[int(torch.randint(len(widths), (), generator=rng))] for widths in choices)


def first_units(graph: ChannelGraph, groups: Sequence[int], widths: Sequence[int]) -> Tensor:
    """The mask of the network that keeps the first ``widths`` units of ``groups`` and all others, bool [U]."""
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    for g, width in zip(groups, widths, strict=True):
        group = graph.groups[g]
        mask[group.start + width : group.start + group.size] = False
    return mask


def fitted(task: Task, mask: Tensor, may_go: Tensor) -> Tensor:
    """The mask near to one of ``first_units`` that meets the budget: some more or fewer units in their order.

    Where the next unit of every group is too much, and the rest is more than 1 % of the full cost, one group becomes
    wider and the others give up what that costs.

    Args:
        task: graph, budget and limits.
        mask: the units that were chosen, bool [U].
        may_go: the units that may go, bool [U].
    """
    meter = task.budget.meter(task.graph)
    full, limit = float(meter(torch.ones(task.graph.num_units))), task.budget.limit(task.graph)
    found = [in_order(task, mask, may_go)]
    if limit - float(meter(found[0])) > TOLERANCE * full:
        for group, widths in zip(task.graph.groups, task.limits.widths(task.graph), strict=True):
            wider = found[0].clone()
            width = int(wider[group.units].sum())
            wider[group.start : group.start + min(group.size, width + widths.step)] = True
            found.append(in_order(task, wider, may_go))
    return max(found, key=lambda kept: float(meter(kept)))


def in_order(task: Task, mask: Tensor, may_go: Tensor) -> Tensor:
    """The units of a mask [U], then the others, from the first of each group on, as many as the budget allows."""
    scores = torch.where(mask, 2.0, 0.0).double()
    for group in task.graph.groups:
        scores[group.units] -= torch.arange(group.size).double() / group.size
    return fit(task.graph, task.budget, scores, prunable=may_go, limits=task.limits)


def units_of(graph: ChannelGraph, groups: Sequence[int]) -> Tensor:
    """The units of groups, bool [U]."""
    units = torch.zeros(graph.num_units, dtype=torch.bool)
    for g in groups:
        units[graph.groups[g].units] = True
    return units
