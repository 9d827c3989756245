"""AutoSlim: sub-networks learn from the full network, and the least useful group becomes narrower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastprune.engine import HeldOut, Placement
from fastprune.host.distributed import Distributed
from fastprune.methods import Task
from fastprune.methods.registry import configure
from fastprune.methods.sp.autoslim import AutoSlim
from fastprune.methods.sp.widths import first_units, random_widths, smallest_widths
from fastprune.networks.subnetworks import SubNetworks
from fastprune.planning.budget import Budget, BudgetError
from fastprune.testing import check_method, network, sample_data, traced

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 32, "stride": 10, "images": 16}


def prepare(budget: str = "flops=0.5", **options: Any) -> tuple[AutoSlim, Task]:
    task = Task(
        network(),
        traced(),
        Budget.parse(budget),
        seed=3,
        data=HeldOut(sample_data(), Placement(), Distributed()),
        rng=torch.Generator().manual_seed(3),
    )
    method = AutoSlim(configure(AutoSlim, {**QUICK, **options}))
    method.setup(task)
    return method, task


def batch() -> tuple[Tensor, Tensor]:
    return next(iter(sample_data().batches("train", 32)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"groups": "interior", "optimizer": "adamw"}])
def test_contract(options: dict[str, Any]) -> None:
    check_method(AutoSlim, **QUICK, **options)


@pytest.mark.slow
def test_contract_in_two_processes() -> None:
    check_method(AutoSlim, distributed=True, **QUICK)


def test_a_step_is_one_update_with_the_gradients_of_all_passes() -> None:
    method, task = prepare(momentum=0.0, weight_decay=0.0, lr=0.1, random=2)
    task.model.train()
    images, labels = batch()
    state = task.rng.get_state()
    widths = [random_widths(method.choices, task.rng) for _ in range(2)]
    widths.append(smallest_widths(method.choices))
    model = network().train()
    narrow = SubNetworks(task.graph, model)
    scores = model(images)
    loss = nn.functional.cross_entropy(scores, labels)
    target = scores.detach().softmax(1)
    for kept in widths:
        logits = narrow(images, mask=first_units(task.graph, method.groups, kept)).log_softmax(1)
        loss = loss - (target * logits).sum(1).mean()
    loss.backward()
    task.rng.set_state(state)
    metrics = method.step(task, images, labels)
    for (name, parameter), start in zip(task.model.named_parameters(), model.parameters(), strict=True):
        if start.grad is not None:
            assert torch.allclose(parameter, start - 0.1 * start.grad, atol=1e-6), name
    assert float(metrics["narrow_loss"]) > 0


def test_the_group_that_costs_the_least_accuracy_becomes_narrower() -> None:
    method, task = prepare()
    images, labels = method.batch = task.data.held_out_batch(16)  # type: ignore[union-attr]
    masks = []
    for number, place in enumerate(method.places):
        places = list(method.places)
        places[number] = place - 10
        masks.append(method.mask(task, places))
    with torch.no_grad():
        scores = [method.slices(images, mask=mask) for mask in masks]
    losses = [float(nn.functional.cross_entropy(s, labels)) for s in scores]
    accuracies = [float((s.argmax(1) == labels).float().mean()) for s in scores]
    best = max(range(len(masks)), key=lambda n: (accuracies[n], -losses[n]))
    before = list(method.places)
    metrics = method.shrink(task)
    assert [n for n, (a, b) in enumerate(zip(before, method.places, strict=True)) if a != b] == [best]
    assert metrics["sub_network_accuracy"] == pytest.approx(accuracies[best])


def test_shrinking_ends_when_the_budget_is_met() -> None:
    method, task = prepare("flops=0.3")
    done = []
    while (now := method.progress(task))[0] < now[1]:
        done.append(now[0])
        method.shrink(task)
    assert done[0] == 0
    assert max(done) > 0
    cost = float(task.budget.cost(task.graph, method.mask(task, method.places)))
    assert cost <= task.budget.limit(task.graph)
    assert float(task.budget.cost(task.graph, method.plan(task).mask)) <= task.budget.limit(task.graph)


def test_infeasible_budgets_and_foreign_states_are_refused() -> None:
    with pytest.raises(BudgetError, match="remains"):
        prepare("params=0.002")
    method, _ = prepare()
    other, _ = prepare(groups="interior")
    with pytest.raises(ValueError, match="autoslim: the state has widths of"):
        other.load_state_dict(method.state_dict())
