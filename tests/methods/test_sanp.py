"""SANP: the lasso touches what goes and nothing else, layers are balanced, and the gap between full and cut closes."""

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


def prepared(budget: str = "flops=0.5", *, closed: float = 0.4, **options: Any) -> tuple[SANP, Task]:
    """A method that is set up on the contract's test network, with a random part of its gates closed."""
    placement, peers = Placement(), Distributed()
    task = Task(network(), traced(), Budget.parse(budget), data=HeldOut(sample_data(), placement, peers))
    method = SANP(configure(SANP, {**QUICK, "architecture": "channel", **options}))
    method.setup(task)
    if method.config.architecture != "channel":
        return method, task
    scores = method.scores.scores
    with torch.no_grad():
        drawn = torch.rand(len(scores), generator=torch.Generator().manual_seed(2))
        scores.copy_(torch.where(drawn < closed, -4.0, 0.0))
    method.choose()
    return method, task


def batch() -> tuple[Tensor, Tensor]:
    return next(iter(sample_data().batches("train", 32)))


def after(method: SANP, task: Task, step: Any) -> dict[str, Tensor]:
    """The parameters after one step on a batch."""
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
def test_the_lasso_shrinks_what_goes_and_leaves_the_rest_to_the_bit(optimizer: str) -> None:
    """Norms fall by ηλα or to nothing, directions stay; every other parameter is that of plain training."""
    method, task = prepared(penalty=40.0, optimizer=optimizer)
    again, same_task = prepared(penalty=40.0, optimizer=optimizer)
    plain = after(again, same_task, again.weight_step)
    norms = again.norms().double()
    aligned = after(method, task, method.align_step)
    goes = method.balance > 0
    expected = (norms - 0.05 * 40.0 * method.balance.double()).clamp(min=0)
    assert torch.allclose(method.norms().double()[goes], expected[goes], atol=1e-5)
    assert torch.equal(method.norms()[~goes], again.norms()[~goes])
    assert bool((method.norms()[goes] == 0).any())
    assert bool((method.norms()[goes] > 0).any())
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


def test_two_norms_take_in_the_readers() -> None:
    """Where filters and readers are apart, the columns of a channel that goes shrink, and batch norm does not."""
    method, task = prepared(penalty=4.0, lasso="apart")
    again, same_task = prepared(penalty=4.0, lasso="apart")
    plain, aligned = after(again, same_task, again.weight_step), after(method, task, method.align_step)
    assert torch.equal(plain["block.1.weight"], aligned["block.1.weight"])
    unit = task.graph.groups[[g.producers[0] for g in task.graph.groups].index("block.0")].units
    gone = method.balance[unit] > 0
    fall = 0.05 * 4.0 * method.balance[unit][gone]
    for name, dim in (("block.0.weight", 0), ("block.3.weight", 1)):
        before, now = (w[name].movedim(dim, 0).flatten(1).norm(dim=1)[gone] for w in (plain, aligned))
        assert torch.allclose(now, (before - fall).clamp(min=0), atol=1e-6)


@pytest.mark.parametrize("balance", BALANCES)
def test_layers_are_balanced(balance: str) -> None:
    """α sums to 1 over layers; proportional to, or to the inverse of, how many channels of the layer go."""
    method, task = prepared(balance=balance)
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
        method, task = prepared(penalty=0.0)
        results.append(after(method, task, getattr(method, step)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_automatic_penalty_takes_twice_what_nine_in_ten_need() -> None:
    method, task = prepared()
    goes = method.balance > 0
    assert len(method.balance[goes].unique()) > 1
    rates = sum(method.training.learning_rate_of(step) for step in range(1, 16))
    task.model.train()
    method.training.steps = 1
    penalty = method.automatic()
    assert penalty is not None
    carried = penalty / 2 * rates * method.balance[goes] >= method.norms()[goes]
    assert abs(float(carried.float().mean()) - 0.9) <= 1 / int(goes.sum())
    open_ones, _ = prepared(closed=0.0)
    assert open_ones.automatic() is None


def test_what_goes_does_not_depend_on_autocast() -> None:
    """Scores are read in float32 wherever they are read, so that a resumed run under bfloat16 goes on alike."""
    method, _ = prepared(architecture="gru", closed=0.0)
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
    method, task = prepared(epochs=40, warm_up=0.1, alignment=0.5, freeze=0.05)
    phases = list(method.phases(task))
    assert [(p.name, p.epochs, p.beside is not None) for p in phases] == [
        ("warm_up", 4, False), ("generator", 16, True), ("alignment", 18, True), ("freeze", 2, False),
    ]  # fmt: skip
    beside = phases[1].beside
    assert beside is not None
    assert (beside.every, beside.samples, beside.batch_size) == (2, 64, 32)
    with pytest.raises(ValueError, match="the lasso before the end"):
        SANPConfig(alignment=0.97)


def test_no_gradient_near_the_target() -> None:
    method, _ = prepared()
    target = method.placement.target
    for distance, moves in ((0.5, True), (2 * DEAD_ZONE, True), (0.5 * DEAD_ZONE, False), (-0.5 * DEAD_ZONE, False)):
        ratio = torch.tensor(target + distance, dtype=torch.float64, requires_grad=True)
        method.cost_term(ratio).backward()
        assert ratio.grad is not None
        assert bool(ratio.grad != 0) == moves


def test_a_generator_step_leaves_the_weights_and_follows_them() -> None:
    """It runs on the weights of this moment, in eval mode, and moves neither them nor the statistics."""
    method, task = prepared(closed=0.0)
    task.model.train()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    first = method.generator_step(task, *batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert all(
        parameter.requires_grad for name, parameter in task.model.named_parameters() if name != "classifier.bias"
    )
    other, other_task = prepared(closed=0.0)
    other_task.model.train()
    for _ in range(3):
        other.weight_step(*batch())
    moved = other.generator_step(other_task, *batch())
    assert float(first["generator_cross_entropy"]) != pytest.approx(float(moved["generator_cross_entropy"]), rel=1e-3)


def test_the_gap_closes() -> None:
    """Channels that go end at zero, so that the network with its gates closed does what the whole one does."""
    method, task = prepared(penalty=500.0)
    images, _ = batch()
    gates = method.placement.spread(method.gates())

    def gap() -> float:
        task.model.eval()
        with torch.no_grad():
            return float((task.model(images) - method.masked(images, gates)).abs().max())

    begin = gap()
    for _ in range(8):
        after(method, task, method.align_step)
    goes = method.balance > 0
    assert bool((method.norms()[goes] == 0).all())
    assert gap() < 1e-5 < 0.01 < begin
