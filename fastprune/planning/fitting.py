"""The choice of units that meets a budget from below, within the limits of widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastprune.graph import ChannelGraph, Group
from fastprune.planning.budget import TOLERANCE, Budget, BudgetError
from fastprune.planning.limits import LimitError, Limits, Widths
from fastprune.planning.resources import Meter

PREFIXES = 512  # prefixes of a ranking whose costs are computed at a time
SLACK = 0.005  # part of the full cost that may stay unused; the promise is TOLERANCE


@dataclass(frozen=True)
class Ranking:
    """Blocks of units, best first. Units of a block stay or go together, so that all widths are allowed ones.

    Args:
        of_unit: place of each unit's block, int64 [U]; -1 = the unit stays in any case, B = it goes in any case.
        groups: group of each block, int64 [B].
        sizes: number of units of each block, int64 [B].
    """

    of_unit: Tensor
    groups: Tensor
    sizes: Tensor


def fit(
    graph: ChannelGraph,
    budget: Budget,
    scores: Tensor,
    *,
    prunable: Tensor | None = None,
    gone: Tensor | None = None,
    limits: Limits | None = None,
) -> Tensor:
    """Keep the units of highest score under a budget, and use nearly all of it.

    The longest prefix of the ranking that fits is kept. If it leaves more than 0.5 % of the full cost unused, the next
    units that still fit are added. If widths are rounded, ``round_to`` units at a time are ranked, by their mean score.

    Args:
        graph: the network.
        budget: the budget.
        scores: importance of each unit [U], comparable across groups; ties go to the lower index.
        prunable: units that may go, bool [U]; None = all.
        gone: units that must go, bool [U], all of them prunable; None = none.
        limits: limits of the widths; None = each group keeps at least one unit.

    Returns:
        Flat mask, bool [U].

    Raises:
        ValueError: if there is not one score per unit, or a score is NaN.
        LimitError: if the limits contradict each other or ``prunable``.
        BudgetError: if the network costs more than the budget even without everything that may go; states its cost.
    """
    if scores.shape != (graph.num_units,):
        raise ValueError(f"scores: a vector of {graph.num_units} units is needed, got shape {tuple(scores.shape)}")
    scores = scores.detach().to("cpu", torch.float64)
    if bool(torch.isnan(scores).any()):
        raise ValueError("scores: NaN has no rank")
    limits = limits or Limits()
    may_go = torch.ones(graph.num_units, dtype=torch.bool) if prunable is None else prunable.cpu()
    gone = torch.zeros_like(may_go) if gone is None else gone.cpu()
    ranking = rank(graph, limits.widths(graph), scores, may_go, gone)
    meter = budget.meter(graph)
    limit, total = budget.limit(graph), float(meter(torch.ones(graph.num_units)))
    low = longest_prefix(graph, meter, ranking, limit, grows=budget.grows)
    if low is None:
        least = float(meter(ranking.of_unit < 0))
        raise BudgetError(
            f"budget '{budget}': {limit / total:.3f} of the full network is asked for, but with every prunable channel "
            f"gone {least / total:.3f} remains{describe_rest(graph, budget, ranking.of_unit < 0, limits)}; "
            "raise the budget, or let more groups be pruned"
        )
    mask = fill(graph, meter, ranking, ranking.of_unit < low, limit, SLACK * total)
    return exchange(graph, meter, ranking, mask, limit, SLACK * total, TOLERANCE * total)


def longest_prefix(graph: ChannelGraph, meter: Meter, ranking: Ranking, limit: float, *, grows: bool) -> int | None:
    """Return the largest number of blocks that fit beside the units that stay in any case; None if these do not fit.

    Bisection finds it if the cost ``grows`` with every unit. A latency does not: 65 channels may take longer than 80.
    """
    low, high = 0, len(ranking.sizes)
    if grows:
        if float(meter(ranking.of_unit < 0)) > limit:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            fits = float(meter(ranking.of_unit < middle)) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
    for end in range(high + 1, 0, -PREFIXES):
        begin = max(0, end - PREFIXES)
        kept = torch.zeros(end - begin, len(graph.groups), dtype=torch.float64)
        kept[0].index_add_(0, graph.group_of_unit, (ranking.of_unit < begin).double())
        rows = torch.arange(1, end - begin)
        kept[rows, ranking.groups[begin : end - 1]] = ranking.sizes[begin : end - 1].double()
        fitting = (meter.of_widths(kept.cumsum(0)) <= limit).nonzero().flatten()
        if len(fitting):
            return begin + int(fitting[-1])
    return None


def rank(graph: ChannelGraph, widths: Sequence[Widths], scores: Tensor, may_go: Tensor, gone: Tensor) -> Ranking:
    """Rank all blocks by their mean scores; the smallest index decides between equal ones."""
    stays, goes = -1, -2
    of_unit = torch.full((graph.num_units,), goes)
    groups: list[int] = []
    sizes: list[int] = []
    means, indices = [], []
    for g, (group, allowed) in enumerate(zip(graph.groups, widths, strict=True)):
        order, bounds = rank_group(group, allowed, scores, may_go, gone)
        of_unit[order[: bounds[0]]] = stays
        for begin, end in pairwise(bounds):
            of_unit[order[begin:end]] = len(sizes)
            groups.append(g)
            sizes.append(end - begin)
        ordered, first = scores[order].numpy(), bounds[0]
        if len(bounds) > 1:
            starts = np.array(bounds[:-1]) - first
            means.append(np.add.reduceat(ordered[first : bounds[-1]], starts) / np.diff(bounds))
            indices.append(np.minimum.reduceat(order[first : bounds[-1]].numpy(), starts))
    best_first = np.lexsort((np.concatenate([*indices, []]), -np.concatenate([*means, []])))
    place = torch.empty(len(best_first) + 2, dtype=torch.int64)
    place[torch.from_numpy(best_first)] = torch.arange(len(best_first))
    place[stays], place[goes] = -1, len(best_first)
    return Ranking(place[of_unit], torch.tensor(groups)[best_first], torch.tensor(sizes)[best_first])


def rank_group(group: Group, widths: Widths, scores: Tensor, may_go: Tensor, gone: Tensor) -> tuple[Tensor, list[int]]:
    """Return the units of a group, those that must stay first, then best first; and the widths that it may have."""
    movable = may_go[group.units]
    fixed = widths.at_least(int((~movable).sum()))
    if fixed > widths.most:
        raise LimitError(
            f"group {group.name!r}: {fixed} of its {group.size} units may not go, but its limits allow at most "
            f"{widths.most} to stay; let the method prune them, or loosen the limits"
        )
    best_first = scores[group.units].argsort(descending=True, stable=True)
    rank_of_kind = movable.int() + gone[group.units].int()
    order = group.start + best_first[rank_of_kind[best_first].argsort(stable=True)]
    first = max(widths.least, fixed)
    bounds = [first, *range(first + widths.step, widths.most + 1, widths.step)]
    bounds += [widths.most] * (bounds[-1] < widths.most)  # the last step to all units is a shorter one
    most = max(first, group.size - int(gone[group.units].sum()))
    return order, [bound for bound in bounds if bound <= most]


def fill(
    graph: ChannelGraph, meter: Meter, ranking: Ranking, mask: Tensor, limit: float, slack: float, skip: int = -1
) -> Tensor:
    """Add to what is kept the next blocks of the ranking that fit, until the slack is small or none fits.

    A block is added only after the blocks of its group that come before it in the ranking: the best units stay.

    Args:
        graph: the network.
        meter: the cost.
        ranking: the blocks.
        mask: the units that are kept so far, whole blocks.
        limit: the largest cost.
        slack: the part of it that may stay unused.
        skip: a group that gets no blocks.
    """
    mask = mask.clone()
    kept = graph.cost_model.kept(mask)
    left = torch.ones(len(ranking.sizes), dtype=torch.bool)
    left[ranking.of_unit[mask & (ranking.of_unit >= 0)]] = False
    left &= ranking.groups != skip
    places = left.nonzero().flatten().tolist()
    blocks = [(place, int(ranking.groups[place]), int(ranking.sizes[place])) for place in places]
    while blocks and limit - float(meter.of_widths(kept)) > slack:
        more = torch.zeros(len(graph.groups), dtype=torch.float64)
        for _, g, size in reversed(blocks):
            more[g] = size
        fits = (meter.of_widths(kept + more.diag()) <= limit).tolist()
        blocks = [block for block in blocks if fits[block[1]]]
        if blocks:
            place, g, size = blocks.pop(0)
            mask |= ranking.of_unit == place
            kept[g] += size
    return mask


def exchange(
    graph: ChannelGraph, meter: Meter, ranking: Ranking, mask: Tensor, limit: float, slack: float, tolerance: float
) -> Tensor:
    """Give up the last block of one group for blocks of others, where that uses a budget that is hardly used.

    In a small network no single block may fit into a gap of several per cent, while an exchange of two does.

    Args:
        graph: the network.
        meter: the cost.
        ranking: the blocks.
        mask: the units that are kept.
        limit: the largest cost.
        slack: the part of it that may stay unused after an exchange.
        tolerance: the part of it that may stay unused without one.
    """
    unused = limit - float(meter(mask))
    if unused <= tolerance:
        return mask
    best = mask
    for g, group in enumerate(graph.groups):
        places = ranking.of_unit[group.units]
        kept = places[mask[group.units] & (places >= 0) & (places < len(ranking.sizes))]
        if len(kept):
            without = mask & (ranking.of_unit != kept.max())
            other = fill(graph, meter, ranking, without, limit, slack, skip=g)
            left = limit - float(meter(other))
            if left < unused:
                best, unused = other, left
    return best


def describe_rest(graph: ChannelGraph, budget: Budget, mask: Tensor, limits: Limits) -> str:
    """Describe the smallest network for an error message: its limits and its largest layers."""
    text = f" (limits: {limits})" if str(limits) != "none" else ""
    largest = budget.largest_layers(graph, mask)
    if largest:
        text += ", most of it in " + ", ".join(f"{name} ({share:.0%})" for name, share in largest)
    return text
