"""DP: relaxed gates of one number per channel, drawn in each step, and the gates without noise."""

from __future__ import annotations

import pytest
import torch

from fastprune.methods import Task, interior_units
from fastprune.methods.gates.dp import DP, DPConfig
from fastprune.ops import gumbel_gate
from fastprune.planning.budget import Budget
from fastprune.testing import check_method, network, sample_data, traced

QUICK = {"epochs": 2, "samples": 96, "batch_size": 32, "evaluate_every": 2}


def prepare(budget: str = "flops=0.5", **options) -> tuple[DP, Task]:
    """Set up a method on the contract's test network."""
    task = Task(network(), traced(), Budget.parse(budget))
    method = DP(DPConfig(**options))
    method.setup(task)
    return method, task


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(sample_data().batches("train", 16)))


@pytest.mark.parametrize("options", [{}, {"architecture": "channel", "noise": "logistic", "groups": "all"}])
def test_contract(options):
    check_method(DP, **QUICK, **options)


@pytest.mark.slow
def test_contract_in_two_processes():
    check_method(DP, distributed=True, **QUICK)


def test_pruning_starts_from_the_full_network():
    method, task = prepare()
    assert bool((method.gates() == 1).all())
    metrics = method.step_on(task, *batch())
    assert float(metrics["flops_ratio"]) > 0.97
    assert float(metrics["open"]) > 0.97


def test_a_step_follows_the_gradient_of_loss_and_cost():
    """With a cost term alone every open gate falls, as closing any of them makes the network cheaper."""
    method, task = prepare(architecture="channel", regularisation=1e4, learning_rate=0.01)
    for _ in range(3):
        method.step_on(task, *batch())
    assert bool((method.current_scores() < 0).all())
    untouched, task = prepare(architecture="channel", regularisation=0.0, learning_rate=0.01)
    untouched.step_on(task, *batch())
    assert bool((untouched.current_scores() > 0).any())


def test_noise_differs_between_steps_and_not_between_runs():
    method, task = prepare(base=0.0)
    first = method.draw(method.current_scores(), task.seed)
    again = method.draw(method.current_scores(), task.seed)
    method.step += 1
    second = method.draw(method.current_scores(), task.seed)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    expected = gumbel_gate(method.current_scores(), seed=task.seed, step=1, temperature=0.4, base=0.0, noise="gumbel")
    assert torch.equal(second, expected)


def test_the_plan_keeps_the_open_gates_if_they_meet_the_budget():
    """With scores of random sign and a budget equal to the open gates' cost, the plan keeps these gates."""
    method, task = prepare(architecture="channel", base=0.5)
    graph = task.graph
    with torch.no_grad():
        method.scores.parts.uniform_(-2, 1, generator=torch.Generator().manual_seed(1)).div_(method.scores.stride)
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    mask[method.placement.index] = method.current_scores() + 0.5 >= 0
    ratio = float(task.budget.cost(graph, mask)) / float(task.budget.cost(graph))
    again, task = prepare(f"flops={ratio + 0.002}", architecture="channel", base=0.5)
    again.load_state_dict(method.state_dict())
    plan = again.plan(task)
    assert torch.equal(plan.mask.bool(), mask)
    assert bool(plan.mask.bool()[~interior_units(graph)].all())
    assert again.results()["channels_changed_by_projection"] == 0


def test_the_plan_closes_the_lowest_scores_if_the_gates_cost_too_much():
    method, task = prepare("flops=0.6", architecture="channel")
    with torch.no_grad():
        method.scores.parts.uniform_(-2, 1, generator=torch.Generator().manual_seed(1)).div_(
            method.scores.stride
        )  # all open with base 3
    plan = method.plan(task)
    kept = plan.mask.bool()[method.placement.index]
    scores = method.current_scores()
    assert (
        float(scores[kept].min()) < float(scores[~kept].max()) + 0.5
    )  # filling the budget may swap scores at the threshold
    assert float(scores[kept].mean()) > float(scores[~kept].mean()) + 0.5
    assert float(task.budget.cost(task.graph, plan.mask)) <= task.budget.limit(task.graph)


def test_a_state_of_another_network_is_refused():
    method, _ = prepare()
    other, _ = prepare(groups="all")
    with pytest.raises(ValueError, match="dp: the state is for other gates"):
        method.load_state_dict(other.state_dict())
