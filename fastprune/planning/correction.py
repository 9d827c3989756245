"""Corrections of a budget of latency whose plan misses it as measured, though not as modelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastprune.graph import ChannelGraph
from fastprune.graph.plan import PruningPlan
from fastprune.planning.budget import Budget

CLOSE = 0.03
"""The largest relative difference between a measured latency and its budget that is left as it is."""


def excess(budget: Budget, times: Mapping[str, float]) -> float:
    """Return the measured latency of a compact network in units of the one that the budget allows.

    Args:
        budget: a budget of latency.
        times: milliseconds of the "full" and of the "planned" network, measured side by side.
    """
    allowed = budget.value if budget.absolute else budget.value * times["full"]
    return times["planned"] / allowed


def next_budget(budget: Budget, graph: ChannelGraph, plans: Sequence[PruningPlan], over: Sequence[float]) -> Budget:
    """Return the budget of modelled latency with which the next plan should meet the measured one.

    After one plan the next is modelled to take as much less as the first took too much; after two the measured latency
    counts as linear in the modelled one. No plan goes more than half of the way to the full network.

    Args:
        budget: the budget.
        graph: the network.
        plans: the plans so far, one or more.
        over: what ``excess`` measured of each.
    """
    modelled = [float(budget.cost(graph, plan.mask)) for plan in plans]
    value = modelled[-1] / over[-1]
    if len(plans) > 1 and (over[-1] - over[-2]) * (modelled[-1] - modelled[-2]) > 0:
        value = modelled[-1] + (1 - over[-1]) * (modelled[-1] - modelled[-2]) / (over[-1] - over[-2])
    half = (modelled[-1] + float(budget.cost(graph))) / 2
    return replace(budget, value=min(value, half), absolute=True)
