"""Budgets: their texts, and that they are met from below."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import fastprune as fp
from fastprune.planning.budget import Budget, BudgetError
from fastprune.planning.fitting import fit


@pytest.mark.parametrize(
    ("text", "resource", "value"),
    [
        ("auth=0.5", "auth", 0.5),
        ("eq8=2G", "eq8", 2e9),
        ("latency=0.6", "latency", 0.6),
        ("flops=0.5", "flops", 0.5),
        ("params=1", "params", 1.0),
        ("flops=2G", "flops", 2e9),
        ("FLOPS = 2.5g", "flops", 2.5e9),
        ("params=1.5M", "params", 1.5e6),
        ("flops=41000000", "flops", 41e6),
        ("flops=1e9", "flops", 1e9),
    ],
)
def test_budgets_that_are_read(text: str, resource: str, value: float) -> None:
    assert Budget.parse(text) == Budget(resource, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "flops=1.5",
        "flops=0",
        "flops=-1",
        "flops=nan",
        "flops=1..2",
        "1.5",
        "101%",
        "latency=150%",
        "flops=2G%",
        "flops",
        "",
        "flops=2X",
        "latency=12",
        "latency=0ms",
        "latency=2G",
        "flops=3ms",
    ],
)
def test_budgets_that_are_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="budget"):
        Budget.parse(text)


@pytest.mark.parametrize(("text", "value"), [("12ms", 12.0), ("0.5 ms", 0.5), ("0.012s", 12.0), ("800us", 0.8)])
def test_times_are_milliseconds(text: str, value: float) -> None:
    budget = Budget.parse(f"latency={text}")
    assert budget.absolute
    assert budget.value == pytest.approx(value, rel=1e-12)
    assert Budget.parse(budget.text) == budget


def test_text_is_read_as_the_same_budget() -> None:
    for budget in (Budget("flops", 1 / 3), Budget("params", 123456789.0), Budget("latency", 1 / 3)):
        assert Budget.parse(budget.text) == budget


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("dtype", "int8")])
def test_conditions_are_checked(field: str, value: object) -> None:
    with pytest.raises(BudgetError, match=str(value)):
        fp.Conditions(**{field: value})  # type: ignore[arg-type]


def test_an_unknown_resource_is_refused() -> None:
    with pytest.raises(BudgetError, match="the resource 'joules' is none of flops, params, latency, eq8, auth"):
        Budget("joules", 0.5)  # type: ignore[arg-type]


def test_a_refused_fraction_says_what_is_allowed() -> None:
    with pytest.raises(BudgetError, match=r"budget 'flops=1\.5': the fraction to keep must be in \(0, 1\]"):
        Budget.parse("flops=1.5")


@pytest.fixture(scope="module")
def graph() -> fp.ChannelGraph:
    return fp.trace(torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    "text", ["flops=0.5", "flops=0.1", "flops=0.99", "params=0.5", "params=0.05", "flops=60M", "params=3M"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_budgets_are_met_from_below_within_one_percent(graph: fp.ChannelGraph, text: str, seed: int) -> None:
    budget = Budget.parse(text)
    scores = torch.randn(graph.num_units, generator=torch.Generator().manual_seed(seed))
    mask = fit(graph, budget, scores)
    total, limit = float(budget.cost(graph)), budget.limit(graph)
    assert limit - 0.01 * total <= float(budget.cost(graph, mask)) <= limit
    assert all(bool(mask[group.units].any()) for group in graph.groups)


def test_the_best_units_stay(graph: fp.ChannelGraph) -> None:
    scores = torch.randn(graph.num_units, generator=torch.Generator().manual_seed(0))
    mask = fit(graph, Budget("flops", 0.5), scores)
    # Besides the prefix of the ranking, only the few units that fill the last half percent may stay.
    threshold = scores[~mask].max()
    assert int((mask & (scores < threshold)).sum()) <= 0.01 * graph.num_units


def test_units_that_may_not_go_stay(graph: fp.ChannelGraph) -> None:
    prunable = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(0)) < 0.7
    mask = fit(graph, Budget("flops", 0.6), torch.zeros(graph.num_units), prunable=prunable)
    assert bool(mask[~prunable].all())


@pytest.mark.parametrize("round_to", [1, 8])
def test_units_that_are_gone_do_not_come_back(graph: fp.ChannelGraph, round_to: int) -> None:
    """Even if there is room for them, and for any scores."""
    limits = fp.Limits(round_to=round_to)
    scores = torch.randn(graph.num_units, generator=torch.Generator().manual_seed(0))
    gone = ~fit(graph, Budget("flops", 0.5), -scores, limits=limits)
    assert torch.equal(fit(graph, Budget("flops", 0.9), scores, gone=gone, limits=limits), ~gone)
    mask = fit(graph, Budget("flops", 0.4), scores, gone=gone, limits=limits)
    assert not bool((mask & gone).any())
    assert bool((mask & ~gone).any())


def test_min_keep_holds(graph: fp.ChannelGraph) -> None:
    scores = torch.arange(graph.num_units).float()
    mask = fit(graph, Budget("flops", 0.3), scores, limits=fp.Limits(min_keep=5))
    assert min(int(mask[group.units].sum()) for group in graph.groups) == 5


def test_a_budget_out_of_reach_says_what_remains(graph: fp.ChannelGraph) -> None:
    with pytest.raises(
        BudgetError,
        match=r"0\.001 of the full network is asked for.* 0\.\d+ remains .limits: min_keep 8., most of it in conv1",
    ):
        fit(graph, Budget("flops", 0.001), torch.zeros(graph.num_units), limits=fp.Limits(min_keep=8))


def test_a_budget_above_the_network_is_refused(graph: fp.ChannelGraph) -> None:
    with pytest.raises(BudgetError, match="nothing to prune"):
        Budget("flops", 1e12).limit(graph)


def test_nan_has_no_rank(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    scores = torch.zeros(graph.num_units)
    scores[3] = float("nan")
    with pytest.raises(ValueError, match="NaN has no rank"):
        fit(graph, Budget("flops", 0.5), scores)
