"""Allocation: the widths of all groups that lose least under a budget, for scores that are losses.

Each group has a curve, the loss of its k worst units, and each unit has a price, what the network's cost falls by when
it goes. The budget is a knapsack: keep the units whose loss per price is above one threshold. Prices depend on the
widths of the neighbours, so that prices and widths are computed in turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.planning.budget import Budget
from fastprune.planning.fitting import fit
from fastprune.planning.limits import Limits
from fastprune.planning.resources import Meter

TURNS = 12


def allocate(
    graph: ChannelGraph,
    budget: Budget,
    losses: Tensor,
    *,
    prunable: Tensor | None = None,
    limits: Limits | None = None,
) -> Tensor:
    """Keep the units whose removal would lose most for what it saves.

    Args:
        graph: the network.
        budget: the budget.
        losses: what the network loses when a unit goes after all worse ones of its group, at least 0, [U].
        prunable: units that may go, bool [U]; None = all.
        limits: limits of the widths; with ``round_to`` the blocks are what is chosen.

    Returns:
        The flat mask with the smallest sum of losses among those of all turns, bool [U].

    Raises:
        ValueError, LimitError, BudgetError: as ``fitting.fit``.
    """
    losses = losses.detach().to("cpu", torch.float64)
    meter, groups = budget.meter(graph), graph.group_of_unit
    widths = graph.offsets.diff().double()
    price = prices(meter, widths)
    best, least = torch.ones(graph.num_units, dtype=torch.bool), float("inf")
    for _ in range(TURNS):
        mask = fit(graph, budget, losses / price[groups], prunable=prunable, limits=limits)
        lost = float(losses[~mask].sum())
        if lost < least:
            best, least = mask, lost
        kept = graph.cost_model.kept(mask)
        if torch.equal(kept, widths):
            break
        widths = kept
        price = (price * prices(meter, widths)).sqrt()  # half of the way, so that neighbours do not swap for ever
    return best


def prices(meter: Meter, widths: Tensor) -> Tensor:
    """Return what one unit of each group costs at some widths, positive, [G].

    The price is taken over an eighth of the width, since a latency does not change with every unit.
    """
    steps = (widths / 8).floor().clamp(min=1)
    fewer = (widths.unsqueeze(0) - steps.diag()).clamp(min=0)
    saved = (meter.of_widths(widths) - meter.of_widths(fewer)) / steps
    positive = saved[saved > 0]
    smallest = float(positive.min()) if len(positive) else 1.0
    return saved.clamp(min=smallest)
