"""Optimizers continue with the compact model as if the channels had never existed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    optimizer.zero_grad()
    model(images).square().sum().backward()
    optimizer.step()


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Make an optimizer of two groups of parameters with different learning rates."""
    parameters = list(model.parameters())
    return OPTIMIZERS[name]([{"params": parameters[:4]}, {"params": parameters[4:], "lr": 0.02}])


@pytest.fixture
def plan(tiny: nn.Module) -> fp.PruningPlan:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    mask = torch.rand(graph.num_units) < 0.5
    for group in graph.groups:
        mask[group.start] = True
    return graph.plan(mask)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_next_step_is_that_of_the_masked_model(name: str, tiny: nn.Module, plan: fp.PruningPlan) -> None:
    model = tiny.double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    optimizer = make_optimizer(model, name)
    for _ in range(2):
        step(model, optimizer, images)
    masked, compact = fp.masked(model, plan), fp.apply(plan, model)
    reference = make_optimizer(masked, name)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fp.slice_optimizer(optimizer, plan, model, compact)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, len(list(compact.parameters())) - 4]
    step(masked, reference, images)
    step(compact, optimizer, images)
    sliced = fp.apply(plan, masked, check=False)
    for (parameter, got), want in zip(compact.named_parameters(), sliced.parameters(), strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12), parameter
    assert {id(p) for p in optimizer.state} == {id(p) for p in compact.parameters()}


def test_a_schedule_continues(tiny: nn.Module, plan: fp.PruningPlan) -> None:
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    fp.slice_optimizer(optimizer, plan, tiny, fp.apply(plan, tiny))
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_parameters_of_other_models_are_refused(tiny: nn.Module, plan: fp.PruningPlan) -> None:
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*tiny.parameters(), *other.parameters()], lr=0.1)
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match="group 0 is not the model's"):
        fp.slice_optimizer(optimizer, plan, tiny, fp.apply(plan, tiny))
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


def test_state_of_another_shape_is_refused(tiny: nn.Module, plan: fp.PruningPlan) -> None:
    optimizer = torch.optim.Adafactor(tiny.parameters(), lr=0.1)
    step(tiny.eval(), optimizer, torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"has shape \(.*; only state of the parameter's shape \(.* can be sliced"):
        fp.slice_optimizer(optimizer, plan, tiny, fp.apply(plan, tiny))
    assert all(p in optimizer.state for p in tiny.parameters())
