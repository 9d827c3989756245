"""Allocation: the widths of all groups that lose least under a budget, for scores that are losses.

Each group has a curve, the loss of its k worst units. The budget is a knapsack of one item per group, its width. A
price per group, what the network's cost falls by with each unit, makes it a ranking by loss per price; prices depend
on the widths of neighbours, so that prices and widths are computed in turns. Then pairs of groups exchange units, as
long as that loses less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.planning.budget import Budget
from fastprune.planning.fitting import fit, rank_group
from fastprune.planning.limits import Limits
from fastprune.planning.resources import Meter

TURNS = 12
STRIDES = (1, 2, 4)  # allowed widths that one side of an exchange goes down or up by
EXCHANGES = 500
BEGINS = 3  # widths that exchanges begin with; the best end is taken


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
        limits: limits of the widths; the allowed widths alone are chosen from.

    Returns:
        The flat mask, bool [U].

    Raises:
        ValueError, LimitError, BudgetError: as ``fitting.fit``.
    """
    losses = losses.detach().to("cpu", torch.float64)
    meter, groups = budget.meter(graph), graph.group_of_unit
    widths = graph.offsets.diff().double()
    price = prices(meter, widths)
    masks = []
    for _ in range(TURNS):
        mask = fit(graph, budget, losses / price[groups], prunable=prunable, limits=limits)
        masks.append(mask)
        kept = graph.cost_model.kept(mask)
        if torch.equal(kept, widths):
            break
        widths = kept
        price = (price * prices(meter, widths)).sqrt()  # half of the way, so that neighbours do not swap for ever
    may_go = torch.ones(graph.num_units, dtype=torch.bool) if prunable is None else prunable.cpu()
    curves = Curves.of(graph, losses, may_go, limits or Limits())
    limit = budget.limit(graph)
    begins = sorted(masks, key=lambda mask: float(losses[~mask].sum()))[:BEGINS]
    ends = [exchange(curves, meter, limit, curves.place(mask)) for mask in begins]
    return min(ends, key=lambda mask: float(losses[~mask].sum()))


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


@dataclass(frozen=True)
class Curves:
    """The allowed widths of all groups and what the network loses at each, as tables with a row per group.

    Args:
        orders: the units of each group, best first.
        counts: number of allowed widths of each group, int64 [G].
        widths: allowed widths, rising, float64 [G, W]; the last one is repeated in rows with fewer.
        losses: the loss at each width, float64 [G, W].
    """

    orders: tuple[Tensor, ...]
    counts: Tensor
    widths: Tensor
    losses: Tensor

    @staticmethod
    def of(graph: ChannelGraph, losses: Tensor, may_go: Tensor, limits: Limits) -> Curves:
        """Return the curves of a network."""
        orders, widths, lost = [], [], []
        none = torch.zeros_like(may_go)
        for group, allowed in zip(graph.groups, limits.widths(graph), strict=True):
            order, bounds = rank_group(group, allowed, losses, may_go, none)
            rest = losses[order].flip(0).cumsum(0).flip(0)  # of a unit and all worse ones
            orders.append(order)
            widths.append(torch.tensor(bounds, dtype=torch.float64))
            lost.append(torch.cat([rest, rest.new_zeros(1)])[torch.tensor(bounds)])
        counts = torch.tensor([len(row) for row in widths])
        longest = int(counts.max())
        return Curves(
            tuple(orders),
            counts,
            *(torch.stack([torch.cat([r, r[-1:].expand(longest - len(r))]) for r in rows]) for rows in (widths, lost)),
        )

    def place(self, mask: Tensor) -> Tensor:
        """Return the place of each group's width in a mask, int64 [G]."""
        kept = torch.tensor([int(mask[order].sum()) for order in self.orders], dtype=torch.float64)
        return (self.widths < kept.unsqueeze(1)).sum(1)

    def mask(self, places: Tensor) -> Tensor:
        """Return the mask of some widths, bool [U]."""
        mask = torch.zeros(sum(len(order) for order in self.orders), dtype=torch.bool)
        for order, row, place in zip(self.orders, self.widths, places.tolist(), strict=True):
            mask[order[: int(row[place])]] = True
        return mask


def exchange(curves: Curves, meter: Meter, limit: float, places: Tensor) -> Tensor:
    """Let two groups at a time exchange units as long as that loses less within the limit; return the mask.

    Args:
        curves: the curves of all groups.
        meter: the cost.
        limit: the largest cost.
        places: the widths to start from, int64 [G].
    """
    rows = torch.arange(len(places))
    down, up, fewer, more = (x.flatten() for x in torch.meshgrid(
        rows, rows, torch.tensor([0, *STRIDES]), torch.tensor(STRIDES), indexing="ij"))  # fmt: skip
    differ = down != up
    down, up, fewer, more = down[differ], up[differ], fewer[differ], more[differ]
    for _ in range(EXCHANGES):
        low, high = places[down] - fewer, places[up] + more
        possible = (low >= 0) & (high < curves.counts[up])
        d, u, low, high = down[possible], up[possible], low[possible], high[possible]
        gain = (
            curves.losses[d, places[d]] - curves.losses[d, low] + curves.losses[u, places[u]] - curves.losses[u, high]
        )
        wanted = (gain > 0).nonzero().flatten()
        wanted = wanted[gain[wanted].argsort(descending=True, stable=True)]
        now = curves.widths[rows, places]
        chosen = None
        for some in wanted.split(1024):  # best first
            trial = now.repeat(len(some), 1)
            at = torch.arange(len(some))
            trial[at, d[some]] = curves.widths[d[some], low[some]]
            trial[at, u[some]] = curves.widths[u[some], high[some]]
            fits = (meter.of_widths(trial) <= limit).nonzero().flatten()
            if len(fits):
                chosen = int(some[fits[0]])
                break
        if chosen is None:
            break
        places = places.clone()
        places[d[chosen]], places[u[chosen]] = low[chosen], high[chosen]
    return curves.mask(places)
