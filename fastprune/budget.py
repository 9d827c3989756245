"""Budgets: what a pruned network may cost, and the choice of units that meets one from below."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.graph.cost import Cost

SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SMALLEST_ABSOLUTE = 1000.0  # a plain number between 1 and this is more likely a slip than a budget
SLACK = 0.005  # part of the full cost below the limit that is not worth filling; the promise is 0.01


class BudgetError(ValueError):
    """A budget that is malformed or cannot be met."""


@dataclass(frozen=True)
class Budget:
    """An upper limit on what the pruned network costs.

    Args:
        resource: "flops" (multiply-accumulates of convolutions and linear layers, the papers' count) or "params".
        value: the fraction of the full network's cost that may stay, in (0, 1], or an absolute number above 1.
    """

    resource: Literal["flops", "params"]
    value: float

    @staticmethod
    def parse(text: str) -> Budget:
        """Read ``flops=0.5``, ``params=0.3``, ``flops=2G`` or ``params=1.5M`` (suffixes K, M, G, T).

        Raises:
            BudgetError: if the text is no budget; says what is needed.

        Example:
            >>> Budget.parse("flops=0.5").value, Budget.parse("flops=2G").value
            (0.5, 2000000000.0)
        """
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([KMGT]?)\s*", text, re.IGNORECASE)
        resource = found.group(1).lower() if found else ""
        if found is None or resource not in ("flops", "params"):
            raise BudgetError(
                f"budget {text!r}: 'flops=…' or 'params=…' is needed, "
                "with a fraction or an absolute number (flops=0.5, flops=2G)"
            )
        try:
            value = float(found.group(2)) * SUFFIXES[found.group(3).upper()]
        except ValueError:
            raise BudgetError(f"budget {text!r}: {found.group(2)!r} is not a number") from None
        if not 0 < value <= 1 and (value < SMALLEST_ABSOLUTE or not value < float("inf")):
            raise BudgetError(
                f"budget {text!r}: the fraction to keep must be in (0, 1]; "
                f"an absolute number of MACs or parameters must be at least {SMALLEST_ABSOLUTE:.0f}"
            )
        return Budget("flops" if resource == "flops" else "params", value)

    def __str__(self) -> str:
        return f"{self.resource}={self.value:g}"

    def of(self, cost: Cost) -> Tensor:
        """The part of a cost that the budget limits."""
        return cost.macs if self.resource == "flops" else cost.params

    def limit(self, graph: ChannelGraph) -> float:
        """The largest allowed cost, in MACs or parameters.

        Raises:
            BudgetError: if the full network is within the budget already, so that there is nothing to prune.
        """
        total = float(self.of(graph.cost()))
        limit = self.value * total if self.value <= 1 else self.value
        if limit >= total:
            raise BudgetError(f"budget '{self}': the full network costs {total:.0f}, so there is nothing to prune")
        return limit


def fit(
    graph: ChannelGraph,
    budget: Budget,
    scores: Tensor,
    *,
    prunable: Tensor | None = None,
    min_keep: int = 1,
) -> Tensor:
    """Keep the units of highest score whose network costs at most the budget, and nearly as much.

    The longest prefix of the ranking that fits is kept. Where it leaves more than 0.5 % of the full cost unused, the
    next units that still fit are added.

    Args:
        graph: the network.
        budget: what it may cost.
        scores: importance of each unit [U], comparable across groups; ties go to the lower index.
        prunable: units that may go, bool [U]; None = all.
        min_keep: units that stay at least in each group (the best ones).

    Returns:
        Flat mask, bool [U].

    Raises:
        ValueError: if there is not one score per unit, a score is NaN, or ``min_keep`` is below 1.
        BudgetError: if the budget is below what is left when everything that may go has gone; states that limit.
    """
    if scores.shape != (graph.num_units,):
        raise ValueError(f"scores: a vector of {graph.num_units} units is needed, got shape {tuple(scores.shape)}")
    if min_keep < 1:
        raise ValueError(f"min_keep: at least 1 unit of each group must stay, got {min_keep}")
    scores = scores.detach().to("cpu", torch.float64)
    if bool(torch.isnan(scores).any()):
        raise ValueError("scores: NaN has no rank")
    may_go = torch.ones(graph.num_units, dtype=torch.bool) if prunable is None else prunable.cpu()
    mask = ~may_go
    for group in graph.groups:
        mask[group.start + scores[group.units].argsort(descending=True, stable=True)[:min_keep]] = True
    limit, total = budget.limit(graph), float(budget.of(graph.cost()))
    least = float(budget.of(graph.cost(mask)))
    if least > limit:
        raise BudgetError(
            f"budget '{budget}': {limit / total:.3f} of the full network is asked for, but with every prunable channel "
            f"gone {least / total:.3f} remains; ask for more, or let more groups be pruned"
        )
    ranking = scores.argsort(descending=True, stable=True)
    ranking = ranking[~mask[ranking]]
    low, high = 0, len(ranking)  # the longest prefix that fits, by bisection: the cost grows with every unit
    while low < high:
        middle = (low + high + 1) // 2
        trial = mask.clone()
        trial[ranking[:middle]] = True
        low, high = (middle, high) if float(budget.of(graph.cost(trial))) <= limit else (low, middle - 1)
    mask[ranking[:low]] = True
    return fill(graph, budget, mask, ranking[low:].tolist(), limit, total)


def fill(graph: ChannelGraph, budget: Budget, mask: Tensor, ranking: list[int], limit: float, total: float) -> Tensor:
    """Add the next units of the ranking that fit, until the slack is small or none does."""
    groups = graph.group_of_unit.tolist()
    kept = torch.zeros(len(graph.groups), dtype=torch.float64).index_add(0, graph.group_of_unit, mask.double())
    one_more = torch.eye(len(graph.groups), dtype=torch.float64)
    while ranking:
        gap = limit - float(budget.of(graph.cost_model.of_widths(kept)))
        if gap <= SLACK * total:
            break
        fits = (budget.of(graph.cost_model.of_widths(kept + one_more)) <= limit).tolist()
        ranking = [unit for unit in ranking if fits[groups[unit]]]
        if ranking:
            unit = ranking.pop(0)
            mask[unit] = True
            kept[groups[unit]] += 1
    return mask
