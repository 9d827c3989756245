"""SANP: the lasso changes pruned channels only, layers are balanced, and the alignment gap closes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastprune.engine import HeldOut, Placement
from fastprune.host.distributed import Distributed
from fastprune.methods import Task
from fastprune.methods.gates.sanp import DEAD_ZONE, SANP, SANPConfig
from fastprune.methods.registry import configure
from fastprune.planning.budget import Budget
from fastprune.testing import check_method, network, sample_data, traced

QUICK: dict[str, Any] = {"epochs": 4, "batch_size": 32, "lr": 0.05, "every": 2, "part": 0.5, "evaluate_every": 2}
BALANCES = ("proportional", "inverse", "uniform")


def prepare(budget: str = "flops=0.5", *, closed: float = 0.4, **options: Any) -> tuple[SANP, Task]:
    """Set up a method on the contract's test network and close a random fraction of its gates."""
    placement, peers = Placement(), Distributed()
    task = Task(network(), traced(), Budget.parse(budget), data=HeldOut(sample_data(), placement, peers))
    method = SANP(configure(SANP, {**QUICK, "architecture": "channel", **options}))
    method.setup(task)
    if method.config.architecture != "channel":
        return method, task
    scores = method.scores.parts
    with torch.no_grad():
        drawn = torch.rand(len(scores), generator=torch.Generator().manual_seed(2))
        scores.copy_(torch.where(drawn < closed, -4.0, 0.0) / method.scores.stride)
    method.choose_channels()
    return method, task


def batch() -> tuple[Tensor, Tensor]:
    return next(iter(sample_data().batches("train", 32)))


def step_once(method: SANP, task: Task, step: Any) -> dict[str, Tensor]:
    """Take one step on a batch; return the parameters."""
    task.model.train()
    step(*batch())
    return {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2},
        pytest.param(
            {"lasso": "apart", "groups": "all", "balance": "inverse", "optimizer": "adamw", "lr": 0.002},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_contract(options: dict[str, Any]) -> None:
    check_method(SANP, **{**QUICK, **options})


@pytest.mark.slow
def test_contract_in_two_processes() -> None:
    check_method(SANP, distributed=True, **QUICK)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_lasso_shrinks_pruned_channels_and_changes_no_bit_of_the_others(optimizer: str) -> None:
    """Norms fall by ηλα, down to 0, and directions stay; all other parameters are those of plain training."""
    method, task = prepare(penalty=40.0, optimizer=optimizer)
    again, same_task = prepare(penalty=40.0, optimizer=optimizer)
    plain = step_once(again, same_task, again.weight_step)
    norms = again.norms().double()
    aligned = step_once(method, task, method.align_step)
    pruned = method.balance > 0
    expected = (norms - 0.05 * 40.0 * method.balance.double()).clamp(min=0)
    assert torch.allclose(method.norms().double()[pruned], expected[pruned], atol=1e-5)
    assert torch.equal(method.norms()[~pruned], again.norms()[~pruned])
    assert bool((method.norms()[pruned] == 0).any())
    assert bool((method.norms()[pruned] > 0).any())
    gates = method.placement.spread(method.gates()).bool()
    touched = set()
    for piece in task.graph.slices:
        if piece.tensor in plain and piece.role in ("out", "depthwise", "channel"):
            rows = (piece.units >= 0) & ~gates[piece.units]
            before, now = (w[piece.tensor].movedim(piece.dim, 0) for w in (plain, aligned))
            assert torch.equal(before[~rows], now[~rows])
            factor = (expected / norms)[piece.units[rows]].float().view(-1, *[1] * (before.dim() - 1))
            assert torch.allclose(now[rows], before[rows] * factor, atol=1e-6)
            touched.add(piece.tensor)
    assert all(torch.equal(plain[name], aligned[name]) for name in plain.keys() - touched)


def test_two_norms_include_the_readers() -> None:
    """With lasso "apart" the readers' columns of a pruned channel shrink, and its batch norm does not."""
    method, task = prepare(penalty=4.0, lasso="apart")
    again, same_task = prepare(penalty=4.0, lasso="apart")
    plain, aligned = step_once(again, same_task, again.weight_step), step_once(method, task, method.align_step)
    assert torch.equal(plain["block.1.weight"], aligned["block.1.weight"])
    unit = task.graph.groups[[g.producers[0] for g in task.graph.groups].index("block.0")].units
    pruned = method.balance[unit] > 0
    fall = 0.05 * 4.0 * method.balance[unit][pruned]
    for name, dim in (("block.0.weight", 0), ("block.3.weight", 1)):
        before, now = (w[name].movedim(dim, 0).flatten(1).norm(dim=1)[pruned] for w in (plain, aligned))
        assert torch.allclose(now, (before - fall).clamp(min=0), atol=1e-6)


@pytest.mark.parametrize("balance", BALANCES)
def test_alpha_balances_the_layers(balance: str) -> None:
    """α sums to 1 over layers and follows the number of pruned channels of the layer, or its inverse."""
    method, task = prepare(balance=balance)
    alphas, counts = [], []
    for group in task.graph.groups:
        part = method.balance[group.units]
        if bool((part > 0).any()):
            assert len(part[part > 0].unique()) == 1
            alphas.append(part.max())
            counts.append((part > 0).sum())
    alpha, count = torch.stack(alphas), torch.stack(counts).float()
    assert len(alpha) > 1
    assert torch.allclose(alpha.sum(), torch.tensor(1.0))
    rule = {"proportional": alpha / count, "inverse": alpha * count, "uniform": alpha}[balance]
    assert torch.allclose(rule, rule[0].expand_as(rule))


def test_without_penalty_it_is_plain_training() -> None:
    results = []
    for step in ("weight_step", "align_step"):
        method, task = prepare(penalty=0.0)
        results.append(step_once(method, task, getattr(method, step)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_automatic_penalty_is_twice_what_nine_in_ten_channels_need() -> None:
    method, task = prepare()
    pruned = method.balance > 0
    assert len(method.balance[pruned].unique()) > 1
    rates = sum(method.training.learning_rate_of(step) for step in range(1, 16))
    task.model.train()
    method.training.steps = 1
    penalty = method.find_penalty()
    assert penalty is not None
    at_zero = penalty / 2 * rates * method.balance[pruned] >= method.norms()[pruned]
    assert abs(float(at_zero.float().mean()) - 0.9) <= 1 / int(pruned.sum())
    all_open, _ = prepare(closed=0.0)
    assert all_open.find_penalty() is None


def test_the_pruned_channels_do_not_depend_on_autocast() -> None:
    """Scores are float32 everywhere, so that a resumed run under bfloat16 continues with the same bits."""
    method, _ = prepare(architecture="gru", closed=0.0)
    with torch.no_grad():
        method.scores.heads.mul_(4.0)
    inside, outside = [], []
    for base in torch.arange(-2.0, 2.0, 0.05).tolist():
        object.__setattr__(method.config, "base", base)
        outside.append(method.gates())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside.append(method.gates())
    assert torch.equal(torch.stack(inside), torch.stack(outside))
    assert 0 < float(torch.stack(inside).mean()) < 1


def test_phases() -> None:
    method, task = prepare(epochs=40, warm_up=0.1, alignment=0.5, freeze=0.05)
    phases = list(method.phases(task))
    assert [(p.name, p.epochs, p.beside is not None) for p in phases] == [
        ("warm_up", 4, False), ("generator", 16, True), ("alignment", 18, True), ("freeze", 2, False),
    ]  # fmt: skip
    beside = phases[1].beside
    assert beside is not None
    assert (beside.every, beside.samples, beside.batch_size) == (2, 64, 32)
    with pytest.raises(ValueError, match="the lasso before the gates freeze"):
        SANPConfig(alignment=0.97)


def test_no_gradient_near_the_target() -> None:
    method, _ = prepare()
    target = method.placement.target
    for distance, moves in ((0.5, True), (2 * DEAD_ZONE, True), (0.5 * DEAD_ZONE, False), (-0.5 * DEAD_ZONE, False)):
        ratio = torch.tensor(target + distance, dtype=torch.float64, requires_grad=True)
        method.cost_term(ratio).backward()
        assert ratio.grad is not None
        assert bool(ratio.grad != 0) == moves


def test_a_generator_step_uses_the_current_weights_and_does_not_change_them() -> None:
    """It runs in eval mode and changes neither weights nor statistics."""
    method, task = prepare(closed=0.0)
    task.model.train()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    first = method.generator_step(task, *batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert all(
        parameter.requires_grad for name, parameter in task.model.named_parameters() if name != "classifier.bias"
    )
    other, other_task = prepare(closed=0.0)
    other_task.model.train()
    for _ in range(3):
        other.weight_step(*batch())
    moved = other.generator_step(other_task, *batch())
    assert float(first["generator_cross_entropy"]) != pytest.approx(float(moved["generator_cross_entropy"]), rel=1e-3)


def test_the_alignment_gap_closes() -> None:
    """Pruned channels end at zero, so that the masked network computes what the full one does."""
    method, task = prepare(penalty=500.0)
    images, _ = batch()
    gates = method.placement.spread(method.gates())

    def gap() -> float:
        task.model.eval()
        with torch.no_grad():
            return float((task.model(images) - method.masked(images, gates)).abs().max())

    begin = gap()
    for _ in range(8):
        step_once(method, task, method.align_step)
    pruned = method.balance > 0
    assert bool((method.norms()[pruned] == 0).all())
    assert gap() < 1e-5 < 0.01 < begin
