"""The keep ratios that gate searches log."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastprune import Budget, trace
from fastprune.graph.interior import gated_units
from fastprune.methods.contract import Task
from fastprune.methods.registry import load


@pytest.mark.parametrize("name", ["dmc", "ddnp"])
def test_logged_keep_ratios_are_those_of_the_hard_gates(name: str, tiny: nn.Module) -> None:
    method_class: Any = load(name)
    method = method_class(method_class.Config(epochs=2, groups="all", evaluate_every=0))
    task = Task(tiny, trace(tiny, torch.zeros(2, 3, 16, 16)), Budget("flops", 0.7))
    method.setup(task)
    if name == "dmc":
        with torch.no_grad():
            method.theta.copy_(torch.rand(len(method.theta), generator=torch.Generator().manual_seed(3)))
    (phase,) = method.phases(task)
    assert phase.end_epoch is not None
    logged = phase.end_epoch(0)
    open_units = method.placement.spread(method.gates().detach())
    assert {key: float(value) for key, value in logged.items()} == pytest.approx(
        {f"keep/{group.name}": open_units[group.units].tolist().count(1.0) / group.size for group in task.graph.groups}
    )
    assert len({float(value) for value in logged.values()}) > 1


def test_groups_without_gates_log_no_keep_ratio(tiny: nn.Module) -> None:
    method_class: Any = load("dmc")
    method = method_class(method_class.Config(groups="interior"))
    task = Task(tiny, trace(tiny, torch.zeros(2, 3, 16, 16)), Budget("flops", 0.7))
    method.setup(task)
    gated = gated_units(task.graph, "interior")
    names = {f"keep/{group.name}" for group in task.graph.groups if gated[group.units].all()}
    assert method.keep_ratios(task) == dict.fromkeys(names, 1.0)
    assert 0 < len(names) < len(task.graph.groups)


@pytest.mark.parametrize(
    ("part", "odd"),
    [(1.0, "odd: the gates ended far above the budget"), (0.0, "odd: the gates ended far below the budget"), (0.7, "")],
)
def test_a_search_that_has_not_settled_is_odd(
    part: float, odd: str, tiny: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    method_class: Any = load("dmc")
    method = method_class(method_class.Config(epochs=2, groups="all"))
    task = Task(tiny, trace(tiny, torch.zeros(2, 3, 16, 16)), Budget("flops", 0.5))
    method.setup(task)
    with torch.no_grad():
        for group in task.graph.groups:
            is_open = torch.arange(group.size) < part * group.size
            method.theta[group.units] = torch.where(is_open, 0.9, 0.1)
    method.plan(task)
    assert odd in caplog.text
    assert ("odd" in caplog.text) == bool(odd)
