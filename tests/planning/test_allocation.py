"""Allocation: the least loss under a budget, against all possible widths; and budgets that hardly any block fits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from fastprune.graph import trace
from fastprune.planning.allocation import allocate
from fastprune.planning.budget import Budget
from fastprune.planning.fitting import fit
from fastprune.planning.limits import Limits


@pytest.fixture(scope="module")
def graph():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.ReLU()]
    return trace(nn.Sequential(*layers, nn.Conv2d(7, 2, 3)).eval(), torch.zeros(1, 3, 16, 16))


def least_loss(graph, budget, losses, step=1):
    """Return the smallest loss of all widths within the budget."""
    limit = budget.limit(graph)
    removed = [
        torch.cat([torch.zeros(1, dtype=torch.float64), losses[g.units].sort().values.cumsum(0)]) for g in graph.groups
    ]
    best = float("inf")
    for widths in product(*(range(step, g.size + 1, step) for g in graph.groups)):
        kept = torch.tensor(widths, dtype=torch.float64)
        if float(budget.meter(graph).of_widths(kept)) <= limit:
            best = min(best, sum(float(r[g.size - w]) for r, g, w in zip(removed, graph.groups, widths, strict=True)))
    return best


@pytest.mark.parametrize("budget", ["flops=0.7", "flops=0.4", "params=0.5"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_is_near_the_least_of_all_widths(graph, budget, seed):
    losses = torch.rand(graph.num_units, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 3
    budget = Budget.parse(budget)
    mask = allocate(graph, budget, losses)
    assert float(budget.cost(graph, mask)) <= budget.limit(graph)
    assert float(losses[~mask].sum()) <= 1.25 * least_loss(graph, budget, losses)


def test_prices_count():
    """Of two groups with equal losses the dear one gives more."""
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    graph = trace(nn.Sequential(*layers, nn.Conv2d(8, 32, 3)).eval(), torch.zeros(1, 3, 16, 16))
    losses = torch.linspace(1, 2, 8, dtype=torch.float64).repeat(2)
    mask = allocate(graph, Budget.parse("flops=0.6"), losses)
    first, second = (int(mask[group.units].sum()) for group in graph.groups)
    assert first > second


def test_limits_and_prunable_units_hold(graph):
    losses = torch.rand(graph.num_units, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prunable = torch.ones(graph.num_units, dtype=torch.bool)
    prunable[graph.groups[0].units] = False
    mask = allocate(graph, Budget.parse("flops=0.5"), losses, prunable=prunable, limits=Limits(round_to=2))
    widths = [int(mask[group.units].sum()) for group in graph.groups]
    assert widths[0] == 8
    assert widths[1] % 2 == 0
    assert widths[2] in (2, 4, 6, 7)


def test_an_exchange_uses_a_budget_that_no_single_block_fits_into():
    """The second group's channels are dear: after its worst one has stayed out, the first group has nothing to add."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 2, 5)).eval()
    graph = trace(model, torch.zeros(1, 3, 16, 16))
    budget = Budget.parse("flops=0.62")
    gaps = []
    for seed in range(20):
        scores = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(seed))
        mask = fit(graph, budget, scores)
        gaps.append((budget.limit(graph) - float(budget.cost(graph, mask))) / float(budget.cost(graph)))
    possible = [
        float(budget.meter(graph).of_widths(torch.tensor(w, dtype=torch.float64)))
        for w in product(range(1, 4), range(1, 5))
    ]
    nearest = max(cost for cost in possible if cost <= budget.limit(graph))
    least = (budget.limit(graph) - nearest) / float(budget.cost(graph))
    assert max(gaps) == pytest.approx(least)
