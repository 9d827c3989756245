"""Score-based methods: budgets, limits, rankings, and refused scores."""

from __future__ import annotations

import pytest
import torch
import torchvision

from fastprune import models
from fastprune.graph import trace
from fastprune.methods import ScoreMethod, Task, interior_units
from fastprune.methods.registry import configure
from fastprune.methods.scores.magnitude import L1, L2, Random, Uniform
from fastprune.methods.scores.ranking import KeepConfig, RankingConfig, local_priority, normalise_scores, ranks
from fastprune.planning.budget import Budget, BudgetError
from fastprune.planning.limits import Limits
from fastprune.testing import check_method, network, traced


def make_task(budget: str, seed: int = 0, limits: Limits | None = None) -> Task:
    return Task(network(), traced(), Budget.parse(budget), limits=limits or Limits(), seed=seed)


def make_plan(method, budget="flops=0.5", seed=0, limits=None, **options):
    task = make_task(budget, seed, limits)
    return method(configure(method, options)).plan(task)


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("method", [Random, L1, L2])
def test_contract(method, ranking):
    check_method(method, ranking=ranking)


def test_contract_of_uniform_and_of_interior_groups():
    check_method(Uniform)
    check_method(Uniform, groups="all")


@pytest.mark.slow
def test_contract_in_two_processes():
    check_method(L1, distributed=True)


@pytest.fixture(scope="module")
def networks():
    """Three networks with their graphs on small inputs."""
    torch.manual_seed(0)
    models_and_sizes = {
        "resnet20": (models.create("resnet20"), 32),
        "resnet18": (torchvision.models.resnet18(weights=None), 64),
        "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small(weights=None), 64),
    }
    return {
        name: (model.eval(), trace(model, torch.zeros(1, 3, size, size)))
        for name, (model, size) in models_and_sizes.items()
    }


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v3_small"])
def test_budgets_are_met_from_below_within_one_percent(networks, name):
    model, graph = networks[name]
    full = graph.cost()
    for text in (
        "flops=0.5",
        "flops=0.75",
        "params=0.4",
        f"flops={0.6 * float(full.macs):.0f}",
        f"params={0.7 * float(full.params):.0f}",
    ):
        budget = Budget.parse(text)
        total, limit = float(budget.cost(graph)), budget.limit(graph)
        for method, options in [(Uniform, {}), (Random, {"ranking": "global"}), (L1, {}), (L2, {"ranking": "global"})]:
            plan = method(configure(method, options)).plan(Task(model, graph, budget))
            cost = float(budget.cost(graph, plan.mask))
            assert limit - 0.01 * total <= cost <= limit, (text, method.name, options, cost / total)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("method", [Uniform, L1])
def test_local_ranking_keeps_the_same_fraction_of_every_group(networks, name, method):
    model, graph = networks[name]
    plan = method(configure(method, {})).plan(Task(model, graph, Budget.parse("flops=0.5")))
    ratios = {group: kept / size for group, (kept, size) in plan.widths.items()}
    common = sorted(ratios.values())[len(ratios) // 2]
    for group, (kept, size) in plan.widths.items():
        # Rounding costs one unit; filling the last 0.5 % of the budget may add another.
        assert abs(kept - common * size) <= 2, (group, kept, size, common)


def test_uniform_keeps_the_first_channels_and_nests():
    small, large = make_plan(Uniform, "flops=0.3"), make_plan(Uniform, "flops=0.6")
    for group in traced().groups:
        for plan in (small, large):
            part = plan.mask[group.units].int()
            assert bool((part.diff() <= 0).all())
    assert bool((small.mask <= large.mask).all())


def test_random_depends_on_the_seed_only():
    first = make_plan(Random, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first.mask, make_plan(Random, seed=1).mask)
    assert not torch.equal(first.mask, make_plan(Random, seed=2).mask)


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("method", [L1, L2, Random])
def test_the_best_channels_of_each_group_are_kept(method, ranking):
    task = make_task("flops=0.4")
    worker = method(configure(method, {"ranking": ranking}))
    scores, plan = worker.scores(task), worker.plan(task)
    for group in task.graph.groups:
        part, kept = scores[group.units], plan.mask[group.units]
        if not kept.all():
            assert part[kept].min() >= part[~kept].max()


class OneGroupIsWorthless(ScoreMethod):
    name = "onesided"

    def scores(self, task: Task) -> torch.Tensor:
        scores = torch.ones(task.graph.num_units)
        scores += torch.linspace(0, 1e-3, task.graph.num_units)
        first = task.graph.groups[0].units
        scores[first] = -torch.arange(task.graph.groups[0].size) - 1.0  # dividing by a mean does not raise these
        return scores


def test_global_ranking_prunes_a_worthless_group_down_to_the_limits():
    size = traced().groups[0].size
    limits = [
        ("flops=0.1", Limits(), 1),
        ("flops=0.3", Limits(min_keep=5), 5),
        ("flops=0.3", Limits(min_keep=5, round_to=4), 8),
        ("flops=0.7", Limits(keep_ratios={"*": (0.75, 1)}), size * 3 // 4),
        ("flops=0.85", Limits(keep_ratios={"*": (0.75, 1)}, min_keep=size), size),
    ]
    for budget, limit, expected in limits:
        plan = make_plan(OneGroupIsWorthless, budget, limits=limit, ranking="global")
        assert next(iter(plan.widths.values())) == (expected, size)


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_limits_hold_in_every_group(ranking):
    for method in (L1, Random):
        plan = make_plan(method, "flops=0.55", limits=Limits(3, 1, {"*": (0.5, 1)}), ranking=ranking)
        for kept, size in plan.widths.values():
            assert kept >= max(3, size / 2)


def test_limits_make_a_budget_infeasible():
    with pytest.raises(BudgetError, match=r"with every prunable channel gone 0\.\d+ remains"):
        make_plan(L1, "flops=0.1", limits=Limits(keep_ratios={"*": (0.7, 1)}))


def test_interior_keeps_all_other_channels():
    inside = interior_units(traced())
    plan = make_plan(L1, "flops=0.7", groups="interior")
    assert bool(plan.mask[~inside].all())
    assert not bool(plan.mask[inside].all())
    names = [g.name for g in traced().groups if inside[g.start]]
    assert names == ["block.0", "expand.0"]


def test_priorities():
    graph = traced()
    scores = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    local, globally = local_priority(graph, scores), normalise_scores(graph, scores)
    for group in graph.groups:
        part = local[group.units]
        assert torch.equal(part.argsort(descending=True), scores[group.units].argsort(descending=True))
        torch.testing.assert_close(
            part.sort().values, -(torch.arange(group.size).flip(0) + 0.5) / group.size, check_dtype=False
        )
        assert float(globally[group.units].mean()) == pytest.approx(1)
    assert torch.equal(
        normalise_scores(graph, torch.zeros(graph.num_units)), torch.zeros(graph.num_units, dtype=torch.float64)
    )
    assert ranks(torch.tensor([2.0, 5.0, 2.0])).tolist() == [1, 0, 2]


class Wrong(ScoreMethod):
    name = "wrong"
    values = torch.zeros(3)

    def scores(self, task: Task) -> torch.Tensor:
        return self.values


def test_wrong_scores_are_refused():
    with pytest.raises(ValueError, match=r"got scores of shape \(3,\); scores for 352 units are needed"):
        make_plan(Wrong)
    Wrong.values = torch.full((traced().num_units,), float("nan"))
    with pytest.raises(ValueError, match="must be finite"):
        make_plan(Wrong)


def test_defaults():
    assert KeepConfig() == KeepConfig(groups="all")
    assert RankingConfig().ranking == "local"
