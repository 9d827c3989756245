"""Slimming, group lasso and soft filter pruning: their changes to gradients and weights, and their choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.engine import HeldOut, Placement
from fastprune.host.distributed import Distributed
from fastprune.methods import Task, unit_norms
from fastprune.methods.registry import configure
from fastprune.methods.scores.group_lasso import GroupLasso
from fastprune.methods.scores.slimming import Slimming
from fastprune.methods.scores.soft import Soft
from fastprune.methods.scores.trained import TrainedMethod
from fastprune.planning.budget import Budget
from fastprune.testing import check_method, network, sample_data, traced

QUICK = {"epochs": 2, "batch_size": 32, "lr": 0.05}
METHODS = [Slimming, GroupLasso, Soft]


def prepare(kind: type[TrainedMethod], budget: str = "flops=0.5", **options: Any) -> tuple[Any, Task]:
    """Set up a method on the contract's test network."""
    model, data = network(), sample_data()
    task = Task(model, traced(), Budget.parse(budget), data=HeldOut(data, Placement(), Distributed()))
    method = kind(configure(kind, {**QUICK, **options}))
    method.setup(task)
    return method, task


def one_step(method: TrainedMethod, task: Task) -> dict[str, Tensor]:
    """Take one step on a batch; return the weights."""
    (phase,) = method.phases(task)
    task.model.train()
    phase.step(*next(iter(sample_data().batches("train", 32))))
    return {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("ranking", ["local", pytest.param("global", marks=pytest.mark.slow)])
def test_contract(kind: type[TrainedMethod], ranking: str) -> None:
    check_method(kind, **QUICK, ranking=ranking, groups="interior" if ranking == "local" else "all")


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_contract_in_two_processes(kind: type[TrainedMethod]) -> None:
    check_method(kind, distributed=True, **QUICK)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", [Slimming, GroupLasso])
def test_without_penalty_it_is_plain_training(kind: type[TrainedMethod], optimizer: str) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 1e-4}
    options |= {} if kind is GroupLasso else {"nesterov": False}
    plain = one_step(*prepare(Soft, **{**options, "nesterov": False}))
    without, penalised = (one_step(*prepare(kind, penalty=penalty, **options)) for penalty in (0.0, 0.5))
    assert all(torch.equal(without[name], plain[name]) for name in plain)
    assert any(not torch.equal(penalised[name], plain[name]) for name in plain)


def test_slimming_adds_the_subgradient_of_the_scales() -> None:
    """In one step of plain SGD the penalty lowers the scales of prunable channels by ηλ sign(γ)."""
    options = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    plain, penalised = (one_step(*prepare(Slimming, penalty=p, **options)) for p in (0.0, 0.3))
    model = network()
    scales = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = dict(model.named_parameters())
    for name in plain:
        lower = 0.05 * 0.3 * before[name].detach().sign() if name in scales else 0.0
        assert torch.allclose(penalised[name], plain[name] - lower, atol=1e-6)


def test_slimming_ranks_by_the_mean_scale() -> None:
    method, task = prepare(Slimming)
    scores, graph = method.scores(task), task.graph
    model = task.model
    stream = next(group for group in graph.groups if group.kind == "stream")
    expected = (model.stem[1].weight.abs() + model.block[4].weight.abs()) / 2
    assert torch.allclose(scores[stream.units], expected.detach().double())
    squeezed = next(group for group in graph.groups if group.size == 24 and "squeeze.1" in group.producers)
    assert not method.prunable(task)[squeezed.units].any()
    assert bool(method.plan(task).mask[squeezed.units].bool().all())


def test_slimming_refuses_networks_without_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8))
    task = Task(model, graph, Budget.parse("flops=0.5"), data=HeldOut(sample_data(), Placement(), Distributed()))
    with pytest.raises(ValueError, match="no prunable channel passes a batch norm"):
        Slimming().setup(task)


def test_group_lasso_shrinks_every_channel_by_its_threshold() -> None:
    """The proximal step after the optimiser lowers norms by ηλ√n, down to 0, and keeps directions."""
    options = {"momentum": 0.0, "weight_decay": 0.0}
    method, task = prepare(GroupLasso, penalty=0.5, **options)
    plain, penalised = one_step(*prepare(GroupLasso, penalty=0.0, **options)), one_step(method, task)
    table = method.table
    first = plain["stem.0.weight"], plain["block.3.weight"]
    assert not torch.equal(first[0], penalised["stem.0.weight"])
    expand = next(group for group in task.graph.groups if "expand.0" in group.producers)
    makers = ("expand.0.weight", "depthwise.0.weight", "squeeze.3.weight", "squeeze.3.bias")
    parts = [*makers, *(f"{norm}.1.{name}" for norm in ("expand", "depthwise") for name in ("weight", "bias"))]
    before, after = (torch.cat([w[part].view(96, -1) for part in parts], 1) for w in (plain, penalised))
    tau = 0.05 * 0.5 * table.sizes[expand.units].double().sqrt()
    expected = before.double() * (1 - tau / before.double().norm(dim=1)).clamp(min=0)[:, None]
    assert torch.allclose(after.double(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [GroupLasso, Soft])
def test_frozen_filters_do_not_change(kind: type[TrainedMethod]) -> None:
    method, task = prepare(kind)
    method.setup(task)
    for parameter in (*task.model.block[0].parameters(), *task.model.block[1].parameters()):
        parameter.requires_grad_(False)
    before = task.model.block[0].weight.detach().clone()
    method.setup(task)
    one_step(method, task)
    method.after_epoch(task)
    assert torch.equal(task.model.block[0].weight, before)
    frozen = next(group for group in task.graph.groups if "block.0" in group.producers)
    assert bool(method.prunable(task)[frozen.units].any()) == (kind is Soft)


def test_the_automatic_penalty_of_group_lasso() -> None:
    """λ Σ η is twice the largest root mean square among the channels that would be pruned."""
    method, task = prepare(GroupLasso)
    rms = method.scores(task)
    pruned = ~method.plan(task).mask.bool()
    rates = sum(method.training.learning_rate_of(step) for step in range(2 * 4))
    assert method.penalty * rates == pytest.approx(2 * float(rms[pruned].max()))


def test_soft_closes_the_pruned_channels_and_lets_them_grow() -> None:
    method, task = prepare(Soft)
    mask = method.plan(task).mask.bool()
    method.after_epoch(task)
    norms = unit_norms(task.graph, task.model, roles=("out", "depthwise"))
    assert bool((norms[~mask] == 0).all())
    assert bool((norms[mask] > 0).all())
    one_step(method, task)
    again = unit_norms(task.graph, task.model, roles=("out", "depthwise"))
    # Channels that batch norm shifts below zero are dead behind the relu and do not grow.
    assert float((again[~mask] > 0).float().mean()) > 0.5


def test_a_training_under_the_lasso_gives_an_exact_plan() -> None:
    result = fp.prune(
        network(), torch.zeros(2, 3, 16, 16), method="group_lasso", budget="flops=0.5", data=sample_data(), **QUICK
    )
    assert result.metrics["search"]["penalty"] > 0
    assert result.metrics["difference"] < 1e-5
