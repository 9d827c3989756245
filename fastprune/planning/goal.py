"""The goal of a search: a budget and limits, which its plan must keep to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastprune.graph import ChannelGraph
from fastprune.graph.plan import PruningPlan
from fastprune.host.distributed import Distributed
from fastprune.planning.budget import Budget, BudgetError, Conditions
from fastprune.planning.limits import LimitError, Limits


@dataclass(frozen=True)
class Goal:
    """The goal of a search: what its plan may cost, and which widths it may have.

    Args:
        budget: the budget.
        limits: the limits of the widths.
        text: the budget as the user gave it.
    """

    budget: Budget
    limits: Limits
    text: str

    @staticmethod
    def make(
        budget: str | float | Budget,
        conditions: Conditions | None,
        limits: Limits | Mapping[str, Any] | None,
        device: torch.device,
    ) -> Goal:
        """Return the goal of the arguments of ``prune``; a latency counts on ``device`` if it names no other."""
        parsed = Budget.of(budget)
        text = budget if isinstance(budget, str) else parsed.text
        return Goal(parsed.under(conditions, device), Limits.of(limits), text)

    def require_reachable(self, graph: ChannelGraph, peers: Distributed) -> None:
        """Refuse a budget or limits that do not fit the network."""
        self.budget.meter(graph, peers)
        self.budget.limit(graph)
        self.limits.widths(graph)

    def check(self, plan: PruningPlan, graph: ChannelGraph) -> None:
        """Refuse a method's plan that misses the goal."""
        budget = self.budget
        if plan.removes_nothing:
            raise ValueError(
                f"the plan removes nothing, although the budget '{budget}' asks for less than the full network"
            )
        planned, limit = float(budget.cost(graph, plan.mask)), budget.limit(graph)
        if planned > limit:
            raise BudgetError(f"the method's plan costs {planned:.10g}, above the budget '{budget}' ({limit:.10g})")
        broken = self.limits.broken_by(graph, plan.mask)
        if broken is not None:
            raise LimitError(f"the method's plan: {broken}")

    def settings(self) -> dict[str, Any]:
        """Return the goal as options of the command line."""
        return {"budget": self.text, **self.limits.as_settings(), **self.budget.condition_settings}
