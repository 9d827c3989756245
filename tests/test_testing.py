"""``check_method`` passes methods that keep the contract, and fails those that break any clause of it."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from fastprune.graph.plan import PruningPlan
from fastprune.methods import Method, Phase, ScoreMethod, Task, option
from fastprune.methods.scores.magnitude import L1
from fastprune.planning.budget import Budget
from fastprune.testing import ContractError, check_method, network, traced


@dataclass(frozen=True)
class Options:
    epochs: int = option(2, "passes", minimum=1)


class Searching(ScoreMethod):
    """A method with a search, state and random choices that keeps the contract; broken ones derive from it."""

    name = "searching"
    needs_data = True
    Config = Options

    def setup(self, task: Task) -> None:
        self.sums = torch.zeros(task.graph.num_units)

    def phases(self, task: Task) -> Iterator[Phase]:
        def step(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            # The order of the sum matters; it has random numbers of the task's generator and the images of every rank.
            drawn = torch.rand(len(self.sums), generator=task.rng)
            mean = task.distributed.mean_(images.mean())
            self.sums = self.sums * 0.7 + drawn * mean
            return {"mean": mean}

        yield Phase("sums", self.config.epochs, step, samples=64, batch_size=16)

    def scores(self, task: Task) -> torch.Tensor:
        return self.sums

    def plan(self, task: Task) -> PruningPlan:
        return L1.plan(_WithDefaults(self), task)

    def state_dict(self):
        return {"sums": self.sums}

    def load_state_dict(self, state):
        self.sums = state["sums"].clone()


class _WithDefaults(L1):
    """A method that plans by another method's scores."""

    def __init__(self, owner: Searching) -> None:
        super().__init__()
        self.owner = owner

    def scores(self, task: Task) -> torch.Tensor:
        return self.owner.scores(task)


def test_methods_that_keep_the_contract_pass():
    check_method(Searching, epochs=1)
    check_method(Searching)
    check_method(L1)


def test_unknown_options_are_no_breach_of_contract():
    with pytest.raises(ValueError, match="has no option 'epoch'"):
        check_method(Searching, epoch=1)


class NoName(L1):
    name = ""


class NoDataclass(L1):
    Config = dict


class Abstract(Method):
    name = "abstract"
    Config = Options


@dataclass(frozen=True)
class Unexplained:
    epochs: int = 3


class NoHelp(Searching):
    Config = Unexplained


@dataclass(frozen=True)
class HoldsASet:
    kept: frozenset = field(default=frozenset({"stem"}), metadata={"help": "names"})


class NoRoundTrip(Searching):
    Config = HoldsASet


class OverBudget(L1):
    def plan(self, task: Task) -> PruningPlan:
        return super().plan(Task(task.model, task.graph, Budget(task.budget.resource, 0.9)))


class UnderBudget(L1):
    def plan(self, task: Task) -> PruningPlan:
        return super().plan(Task(task.model, task.graph, Budget(task.budget.resource, 0.3)))


class NoPlan(L1):
    def plan(self, task: Task):
        return task.graph.cost()


class NeverRefuses(L1):
    def plan(self, task: Task) -> PruningPlan:
        try:
            return super().plan(task)
        except ValueError:
            mask = torch.zeros(task.graph.num_units)
            mask[[group.start for group in task.graph.groups]] = 1
            return task.graph.plan(mask)


class ChangesWeights(L1):
    def plan(self, task: Task) -> PruningPlan:
        with torch.no_grad():
            task.model.classifier.bias.add_(1)
        return super().plan(task)


class ChangesStatistics(Searching):
    def phases(self, task: Task) -> Iterator[Phase]:
        def step(images, labels):
            task.model.train()
            with torch.no_grad():
                task.model(images)
            task.model.eval()
            return {}

        yield Phase("forward", 1, step, samples=32, batch_size=16)


class LeavesGradients(Searching):
    def phases(self, task: Task) -> Iterator[Phase]:
        def step(images, labels):
            task.model(images).sum().backward()
            return {}

        yield Phase("backward", 1, step, samples=32, batch_size=16)


class LeavesFrozen(L1):
    def plan(self, task: Task) -> PruningPlan:
        task.model.requires_grad_(False)
        return super().plan(task)


class LeavesThawed(L1):
    def plan(self, task: Task) -> PruningPlan:
        task.model.requires_grad_(True)
        return super().plan(task)


class LeavesTraining(L1):
    def plan(self, task: Task) -> PruningPlan:
        task.model.block.train()
        return super().plan(task)


class IgnoresTheSeed(L1):
    def scores(self, task: Task) -> torch.Tensor:
        return torch.rand(task.graph.num_units)


class ReadsTheClock(L1):
    def scores(self, task: Task) -> torch.Tensor:
        return torch.rand(task.graph.num_units, generator=torch.Generator().manual_seed(time.perf_counter_ns()))


class ForgetsItsState(Searching):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class DropsItsState(Searching):
    def setup(self, task: Task) -> None:
        super().setup(task)
        self.sums += torch.rand(len(self.sums), generator=torch.Generator().manual_seed(id(self) % 2**31))

    def load_state_dict(self, state):
        pass


class SavesAnObject(Searching):
    def state_dict(self):
        return {"self": self}


class CountsOutsideItsState(Searching):
    def setup(self, task: Task) -> None:
        super().setup(task)
        self.steps = 0

    def phases(self, task: Task) -> Iterator[Phase]:
        def step(images, labels):
            self.steps += 1
            self.sums = self.sums + self.steps * torch.rand(len(self.sums), generator=task.rng)
            return {}

        yield Phase("count", 2, step, samples=64, batch_size=16)


class ChangingPhases(Searching):
    calls = 0

    def phases(self, task: Task) -> Iterator[Phase]:
        self.calls += 1
        return iter([Phase(f"phase {self.calls}", 1, lambda images, labels: {}, samples=32, batch_size=16)])


class UndeclaredData(Searching):
    needs_data = False


class ReportsText(L1):
    def results(self):
        return {"quality": "good"}


BREAKS = {
    "class": [NoName, NoDataclass, Abstract],
    "config": [NoHelp, NoRoundTrip],
    "phases": [ChangingPhases, UndeclaredData],
    "budget": [OverBudget, UnderBudget, NoPlan],
    "refusal": [NeverRefuses],
    "weights": [ChangesWeights, ChangesStatistics, LeavesGradients],
    "flags": [LeavesFrozen, LeavesThawed, LeavesTraining],
    "seed": [IgnoresTheSeed, ReadsTheClock],
    "state": [DropsItsState, SavesAnObject],
    "resume": [ForgetsItsState, CountsOutsideItsState],
    "results": [ReportsText],
}


@pytest.mark.parametrize(("clause", "method"), [(c, m) for c, methods in BREAKS.items() for m in methods])
def test_a_broken_clause_is_named(clause, method):
    with pytest.raises(ContractError, match=rf"breaks the contract \({clause}\)") as caught:
        check_method(method)
    assert caught.value.clause == clause
    assert isinstance(caught.value, AssertionError)


def test_a_plan_that_cannot_be_applied_fails(monkeypatch):
    class WrongSlices(L1):
        def plan(self, task: Task) -> PruningPlan:
            plan = super().plan(task)
            # The plan lacks one reader of the first group.
            slices = tuple(s for s in plan.slices if not (s.role == "in" and s.tensor.startswith("expand")))
            return PruningPlan(plan.mask, plan.groups, slices, plan.inputs, plan.macs, plan.params)

    with pytest.raises(ContractError, match=r"breaks the contract \(exact\)"):
        check_method(WrongSlices)


def test_a_plan_of_another_network_fails():
    class Foreign(L1):
        def plan(self, task: Task) -> PruningPlan:
            plan = super().plan(task)
            return PruningPlan(plan.mask[:-1], plan.groups, plan.slices, plan.inputs, plan.macs, plan.params)

    with pytest.raises(ContractError, match="plan for another network"):
        check_method(Foreign)


RANK_DEPENDENT = """
import torch
from fastprune.methods.scores.magnitude import L1

class RankDependent(L1):
    name = "rank-dependent"
    def scores(self, task):
        return super().scores(task) + 5 * task.distributed.rank * torch.rand(
            task.graph.num_units, generator=torch.Generator().manual_seed(0))

class Fails(L1):
    name = "fails"
    def scores(self, task):
        if task.distributed.world_size > 1:
            raise RuntimeError("only alone")
        return super().scores(task)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "message"), [("RankDependent", "two plans, in"), ("Fails", "only alone")])
def test_processes_that_disagree_fail(tmp_path, monkeypatch, name, message):
    (tmp_path / "plugin_ranks.py").write_text(RANK_DEPENDENT)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("plugin_ranks")
    try:
        with pytest.raises(ContractError, match=rf"(?s)\(distributed\).*{message}"):
            check_method(getattr(module, name), distributed=True)
    finally:
        del sys.modules["plugin_ranks"]


def test_single_channels_are_cheaper_than_the_tolerance():
    """Otherwise a correct method could fail the budget clause."""
    graph = traced()
    full = graph.cost()
    inner = [group for group in graph.groups if group.kind == "plain"]
    for group in inner:
        mask = torch.ones(graph.num_units)
        mask[group.start] = 0
        without = graph.cost(mask)
        assert float(1 - without.macs / full.macs) < 0.01
        assert float(1 - without.params / full.params) < 0.01
    assert {group.kind for group in graph.groups} == {"plain", "stream"}
    assert any(layer.depthwise for layer in graph.layers)
    assert not network().training
