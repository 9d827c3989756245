"""DMC: gates and their gradients, the cost term, one step, the search and its plan."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastprune import models
from fastprune.graph import trace
from fastprune.methods import Task, interior_units
from fastprune.methods.gates.dmc import DMC, DMCConfig, symmetric_decay_
from fastprune.methods.gates.gated import prunable_cost
from fastprune.methods.gates.gates import deterministic_gate
from fastprune.methods.gates.regularisers import log_distance
from fastprune.methods.scores.magnitude import Random
from fastprune.methods.scores.ranking import RankingConfig
from fastprune.networks.masked import MaskedNetwork
from fastprune.ops import bernoulli_gate
from fastprune.planning.budget import Budget, BudgetError
from fastprune.testing import check_method, network, photograph, sample_data, traced

QUICK = {"epochs": 2, "samples": 96, "batch_size": 32, "evaluate_every": 2}


def prepare(budget: str = "flops=0.5", seed: int = 0, **options) -> tuple[DMC, Task]:
    """Set up a method on the contract's test network, by default as in the paper."""
    task = Task(network(), traced(), Budget.parse(budget), seed=seed)
    method = DMC(DMCConfig(**{"variant": "paper", **options}))
    method.setup(task)
    return method, task


def batch(count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(sample_data().batches("train", count)))


# --- gates ------------------------------------------------------------------------------------------------------------


def test_deterministic_gate_opens_from_one_half():
    theta = torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0])
    assert deterministic_gate(theta).tolist() == [0, 0, 1, 1, 1]


def test_deterministic_gate_is_straight_through_on_the_closed_interval():
    theta = torch.tensor([-0.1, 0.0, 0.3, 0.5, 0.9, 1.0, 1.1], requires_grad=True)
    weights = torch.arange(1.0, 8.0)
    (gradient,) = torch.autograd.grad((deterministic_gate(theta) * weights).sum(), theta)
    assert gradient.tolist() == [0, 2, 3, 4, 5, 6, 0]


def test_theta_gets_the_gradient_of_the_gates():
    method, task = prepare(groups="all")
    with torch.no_grad():
        method.theta.uniform_(0.2, 0.8, generator=torch.Generator().manual_seed(0))
    images, labels = batch()
    gates = bernoulli_gate(method.theta.detach(), seed=task.seed, step=0).requires_grad_()
    (of_gates,) = torch.autograd.grad(F.cross_entropy(task.masked(images, gates), labels), gates)
    (of_theta,) = torch.autograd.grad(
        F.cross_entropy(task.masked(images, method.sample(task.seed)), labels), method.theta
    )
    assert torch.equal(of_gates, of_theta)
    assert bool((of_theta[gates.detach() == 0] != 0).any())  # closed gates get it too


# --- the cost term ----------------------------------------------------------------------------------------------------


def test_log_distance_and_its_slope():
    for ratio, target in [(1.0, 0.3), (0.31, 0.3), (0.1, 0.3)]:
        r = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
        value = log_distance(r, target)
        (slope,) = torch.autograd.grad(value, r)
        assert float(value.detach()) == pytest.approx(math.log(abs(ratio - target) + 1))
        assert float(slope) == pytest.approx(math.copysign(1, ratio - target) / (abs(ratio - target) + 1))
    r = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_distance(r, 0.3), r)
    assert float(slope) == 0


@pytest.mark.parametrize("budget", ["flops=0.6", "params=0.6"])
@pytest.mark.parametrize("groups", ["interior", "all"])
def test_gradient_of_the_cost_term(budget, groups):
    method, task = prepare(budget, groups=groups)
    with torch.no_grad():
        method.theta.uniform_(0.2, 1.0, generator=torch.Generator().manual_seed(0))
    place = method.placement
    (gradient,) = torch.autograd.grad(log_distance(place.ratio(method.cost(task)), place.target), method.theta)
    gates = place.spread(deterministic_gate(method.theta.detach())).double()
    r, p = float(place.ratio(method.cost(task)).detach()), place.target
    groups_of = task.graph.group_of_unit[place.index]
    for index, group in enumerate(task.graph.groups):
        mine = gradient[groups_of == index]
        if len(mine):
            assert bool((mine == mine[0]).all())  # every channel of a layer costs the same
            # The cost is multilinear in the widths of coupled layers, so a symmetric difference of 1e-3 units suffices.
            step = torch.zeros_like(gates)
            step[group.start] = 1e-3
            change = task.budget.cost(task.graph, gates + step) - task.budget.cost(task.graph, gates - step)
            expected = math.copysign(1, r - p) / (abs(r - p) + 1) * float(change) / 2e-3 / place.prunable
            assert float(mine[0]) == pytest.approx(expected, rel=1e-5)


def test_the_target_is_relative_to_the_prunable_cost():
    graph = trace(models.create("resnet56"), torch.zeros(1, 3, 32, 32))
    method = DMC(DMCConfig())
    method.setup(Task(models.create("resnet56"), graph, Budget("flops", 0.5)))
    place = method.placement
    assert place.prunable / 1e6 == pytest.approx(125.04, abs=0.005)
    # 1 − 0.5 · 125.49/125.04 = 0.498: the p that gives the paper's 50 % on ResNet-56.
    assert place.target == pytest.approx(0.498, abs=5e-4)
    full, half = torch.tensor([place.full, place.limit])
    assert float(place.ratio(full)) == pytest.approx(1)
    assert float(place.ratio(half)) == pytest.approx(place.target)
    assert place.prunable == prunable_cost(graph, Budget("flops", 0.5), interior_units(graph))


# --- one step ---------------------------------------------------------------------------------------------------------


def test_decay_moves_by_beta_towards_one_half():
    theta = torch.tensor([0.0, 0.2, 0.5, 0.50001, 0.8, 1.0], dtype=torch.float64)
    moved = theta.clone()
    symmetric_decay_(moved, 1e-4)
    expected = torch.tensor([1e-4, 0.2001, 0.5, 0.49991, 0.7999, 0.9999], dtype=torch.float64)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-15)


def test_decay_never_crosses_by_more_than_beta():
    theta = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    above = theta > 0.5
    for _ in range(6000):
        symmetric_decay_(theta, 1e-4)
    assert float((theta - 0.5).abs().max()) <= 1e-4 + 1e-12
    assert float(theta[above].min()) >= 0.5 - 1e-4 - 1e-12


def test_without_a_gradient_theta_moves_by_decay_alone(monkeypatch):
    method, task = prepare(decay=1e-2)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs: [torch.zeros_like(x) for x in inputs])
    method.step_on(task, *batch())
    torch.testing.assert_close(method.theta.detach(), torch.full_like(method.theta, 0.99), rtol=0, atol=1e-7)


def test_a_step_is_adam_then_decay_then_clip(monkeypatch):
    method, task = prepare(decay=0.25, learning_rate=0.125)
    start = torch.tensor([0.0, 0.375, 0.5, 0.625, 1.0, 1.0])
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    with torch.no_grad():
        method.theta[:6] = start
    gradient = torch.zeros_like(method.theta)
    gradient[:6] = sign
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs: [gradient])
    method.step_on(task, *batch())
    # Adam's first step is the learning rate against the sign of the gradient.
    after_adam = start - 0.125 * sign
    expected = (after_adam - 0.25 * torch.sign(after_adam - 0.5)).clamp(0, 1)
    assert expected.tolist() == [0.125, 0.5, 0.625, 0.5, 0.875, 0.625]  # every other order gives other values
    torch.testing.assert_close(method.theta.detach()[:6], expected, rtol=0, atol=1e-6)


def test_gates_at_both_ends_of_the_interval_learn():
    method, task = prepare(groups="all", learning_rate=0.01, decay=0.0)
    half = len(method.theta) // 2
    with torch.no_grad():
        method.theta[:half] = 0.0
        method.theta[half:] = 1.0
        method.theta[[g.start for g in task.graph.groups]] = 1.0
    before = method.theta.detach().clone()
    method.step_on(task, *batch(64))
    moved = method.theta.detach() != before
    assert bool(moved[before == 0].any())
    assert bool(moved[before == 1].any())


@pytest.mark.parametrize("sampling", ["stochastic", "deterministic"])
def test_metrics(sampling):
    method, task = prepare(sampling=sampling)
    with torch.no_grad():
        method.theta[::2] = 0.25
    images, labels = batch()
    gates = method.placement.spread(method.sample(0).detach())
    ratio = float(method.cost(task).detach()) / float(task.graph.cost().macs)
    metrics = {name: float(value) for name, value in method.step_on(task, images, labels).items()}
    with torch.no_grad():
        cross_entropy = float(F.cross_entropy(task.masked(images, gates), labels))
    assert metrics["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert metrics["flops_ratio"] == pytest.approx(ratio)
    r = 1 - (1 - ratio) * method.placement.full / method.placement.prunable
    assert metrics["regulariser"] == pytest.approx(math.log(abs(r - method.placement.target) + 1))
    assert metrics["loss"] == pytest.approx(cross_entropy + 4 * metrics["regulariser"], rel=1e-5)
    assert metrics["open"] == pytest.approx(0.5, abs=0.01)
    assert metrics["randomness"] == pytest.approx(0.375, abs=0.01)


def test_weights_buffers_and_flags_do_not_change_and_weights_get_no_gradient():
    method, task = prepare()
    before = photograph(task.model)
    seen = []
    original = MaskedNetwork.forward

    def watch(self, *inputs):
        seen.append([p.requires_grad for p in task.model.parameters()])
        return original(self, *inputs)

    MaskedNetwork.forward = watch
    try:
        for _ in range(3):
            method.step_on(task, *batch())
    finally:
        MaskedNetwork.forward = original
    assert seen
    assert not any(map(any, seen))
    after = photograph(task.model)
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    assert (before.requires_grad, before.training) == (after.requires_grad, after.training)
    assert after.gradients == []


def test_flags_are_restored_after_an_error():
    method, task = prepare()
    before = photograph(task.model)
    with pytest.raises(ValueError, match="batch"):
        method.step_on(task, batch()[0], batch(8)[1])
    assert photograph(task.model).requires_grad == before.requires_grad


def test_autocast():
    method, task = prepare()
    with torch.autocast("cpu", torch.bfloat16):
        low = {name: float(value) for name, value in method.step_on(task, *batch()).items()}
    exact, task = prepare()
    high = {name: float(value) for name, value in exact.step_on(task, *batch()).items()}
    assert method.theta.dtype == torch.float32
    assert bool(torch.isfinite(method.theta).all())
    assert low["cross_entropy"] == pytest.approx(high["cross_entropy"], rel=0.02)
    assert low["regulariser"] == high["regulariser"]  # the cost term stays exact


# --- search and plan --------------------------------------------------------------------------------------------------


def search(method: DMC, task: Task, steps: int) -> list[dict[str, float]]:
    images, labels = batch(128)
    history = []
    for step in range(steps):
        part = slice(step % 4 * 32, step % 4 * 32 + 32)
        metrics = method.step_on(task, images[part], labels[part])
        history.append({name: float(value) for name, value in metrics.items()})
    return history


@pytest.fixture(scope="module")
def trained():
    """The contract's test network after 30 steps of training."""
    model = network().train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = batch(128)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


@pytest.mark.parametrize(("budget", "groups"), [("flops=0.5", "interior"), ("params=0.5", "all")])
def test_the_search_proceeds_as_in_the_paper(trained, budget, groups):
    task = Task(trained, traced(), Budget.parse(budget))
    method = DMC(DMCConfig(groups=groups, learning_rate=0.01))
    method.setup(task)
    history = search(method, task, 150)
    # Fig. 5: the cost term falls to almost 0 and stays there; the gates become random, then decided again.
    assert history[0]["regulariser"] > 0.3
    assert max(h["regulariser"] for h in history[-30:]) < 0.05
    randomness = [h["randomness"] for h in history]
    assert min(randomness) < 0.35
    assert randomness[-1] > min(randomness) + 0.05
    plan = method.plan(task)
    total, limit = float(task.budget.cost(task.graph)), task.budget.limit(task.graph)
    assert limit - 0.01 * total <= float(task.budget.cost(task.graph, plan.mask)) <= limit
    assert groups == "all" or bool(plan.mask[~interior_units(task.graph)].all())
    # The kept channels are better than random ones.
    images, labels = batch(128)
    random = Random(RankingConfig(groups=groups)).plan(task)
    with torch.no_grad():
        found, drawn = (F.cross_entropy(task.masked(images, p.mask.float()), labels) for p in (plan, random))
    assert float(found) < 0.7 * float(drawn)


@pytest.mark.slow
def test_the_seed_decides():
    plans = []
    for seed in (0, 0, 1):
        method, task = prepare(seed=seed, learning_rate=0.02)
        search(method, task, 20)
        plans.append((method.theta.detach().clone(), method.plan(task).mask))
    assert torch.equal(plans[0][0], plans[1][0])
    assert torch.equal(plans[0][1], plans[1][1])
    assert not torch.equal(plans[0][0], plans[2][0])


def test_the_plan_keeps_the_threshold_if_it_meets_the_budget():
    method, task = prepare(groups="all")
    graph = task.graph
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        method.theta.copy_(torch.rand(graph.num_units, generator=generator) * 0.4)
        for group in graph.groups:
            method.theta[group.units][: group.size * 4 // 5] += 0.6
    own = method.theta.detach() >= 0.5
    ratio = float(graph.cost(own).macs / graph.cost().macs)
    method, task = prepare(f"flops={ratio + 0.004}", groups="all")
    with torch.no_grad():
        method.theta.copy_(torch.where(own, 0.7, 0.3))
    assert torch.equal(method.plan(task).mask, own)
    results = method.results()
    assert results["channels_changed_by_projection"] == 0
    assert results["flops_of_plan"] == pytest.approx(ratio)
    assert results["gated_part"] == method.placement.prunable / method.placement.full


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_saturated_gates_are_projected_by_filter_norm(fill):
    method, task = prepare(groups="all")
    with torch.no_grad():
        method.theta.fill_(fill)
    plan, graph = method.plan(task), task.graph
    total, limit = float(graph.cost().macs), task.budget.limit(graph)
    assert limit - 0.01 * total <= plan.macs[1] <= limit
    for group in graph.groups:
        kept = plan.mask[group.units]
        assert bool(kept.any())
        if not kept.all() and group.kind == "interior" and len(group.producers) == 1:
            norms = task.model.get_parameter(f"{group.name}.weight").detach().flatten(1).norm(dim=1)
            assert norms[kept].min() >= norms[~kept].max()
            assert not bool((kept.int().diff() <= 0).all())  # not just the first ones
    assert method.results()["flops_of_gates"] != pytest.approx(0.5, abs=0.01)


def test_projection_keeps_the_order_of_theta():
    method, task = prepare(groups="interior")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        method.theta.copy_(torch.rand(len(method.theta), generator=generator) * 0.4 + 0.55)  # all open: too costly
    plan = method.plan(task)
    mask = plan.mask[method.placement.index]
    # Channels that fill the last bit of the budget may come from below the threshold; none above it is missing.
    kept, pruned = method.theta.detach()[mask].sort().values, method.theta.detach()[~mask]
    assert int((kept < pruned.max()).sum()) <= 8


def test_an_infeasible_budget_is_refused_before_the_search():
    method = DMC(DMCConfig())
    task = Task(network(), traced(), Budget("flops", 0.02))
    with pytest.raises(BudgetError, match=r"with every prunable channel gone 0\.\d+ remains"):
        method.setup(task)
    DMC(DMCConfig(groups="all")).setup(Task(network(), traced(), Budget("flops", 0.02)))


def test_a_restored_state_continues_exactly():
    method, task = prepare(learning_rate=0.02)
    search(method, task, 5)
    state = method.state_dict()
    other, again = prepare(learning_rate=0.02)
    other.load_state_dict(state)
    search(method, task, 5)
    search(other, again, 5)
    assert torch.equal(method.theta, other.theta)
    assert (method.step, other.step) == (10, 10)
    with pytest.raises(ValueError, match=r"the state has \d+ gates, this network has 352"):
        prepare(groups="all")[0].load_state_dict(state)


def test_the_proxy_accuracy_is_measured_every_few_epochs():
    method, task = prepare(epochs=7, evaluate_every=3)

    class Held:
        num_classes = 10
        held_out = 1
        calls = 0

        def accuracy(self, run):
            self.calls += 1
            expected = task.masked(batch()[0], torch.ones(task.graph.num_units))
            torch.testing.assert_close(run(batch()[0]), expected)
            return 0.25

    task.data = Held()
    (phase,) = method.phases(task)
    logged = [phase.end_epoch(epoch) for epoch in range(7)]
    assert ["proxy_accuracy" in metrics for metrics in logged] == [False, False, True, False, False, True, True]
    assert logged[-1]["proxy_accuracy"] == 0.25
    task.data = None
    assert "proxy_accuracy" not in phase.end_epoch(2)
    assert (phase.epochs, phase.samples, phase.batch_size, phase.augment) == (7, 2500, 256, False)


def test_a_network_with_pinned_channels():
    """Zero-padded shortcuts pin channels of a ResNet's later stages, which get no gates."""
    model = models.create("resnet20").eval()
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    task = Task(model, graph, Budget("flops", 0.5))
    method = DMC(DMCConfig(groups="all"))
    method.setup(task)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    metrics = method.step_on(task, images, torch.arange(4))
    assert math.isfinite(float(metrics["loss"]))
    assert method.plan(task).macs[1] <= 0.5 * method.placement.full


# --- annealing --------------------------------------------------------------------------------------------------------


def test_options_of_the_variants():
    paper, annealed = prepare()[0].config, prepare(variant="annealed")[0].config
    assert (paper.regularisation, paper.annealing) == (4, 0)
    assert (annealed.regularisation, annealed.annealing) == (8, pytest.approx(1 / 3))
    with pytest.raises(ValueError, match="the paper has no annealing"):
        prepare(annealing=0.5)


def test_gates_become_deterministic_in_the_last_epochs():
    method, task = prepare(variant="annealed", epochs=6, evaluate_every=0, annealing=0.5, groups="all")
    with torch.no_grad():
        method.theta.uniform_(generator=torch.Generator().manual_seed(0))
    theta, seen = method.theta.detach(), []
    for epoch in range(6):
        seen.append(method.inverse_kappa)
        method.step = epoch
        gates = method.sample(task.seed)
        probability = theta if method.inverse_kappa == 1 else 0.5 + (theta - 0.5) / max(method.inverse_kappa, 1e-9)
        assert torch.equal(gates, bernoulli_gate(probability.clamp(0, 1), seed=task.seed, step=epoch))
        (slope,) = torch.autograd.grad((gates * theta).sum(), method.theta)
        assert torch.equal(slope, theta)  # straight-through, whatever the probability
        method.end_epoch(task, epoch)
    assert seen == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0])
    assert torch.equal(gates.detach(), (theta >= 0.5).float())


def test_a_restart_in_the_last_epochs_continues():
    options = {"variant": "annealed", "epochs": 4, "evaluate_every": 0, "annealing": 1.0}
    method, task = prepare(**options)
    method.step_on(task, *batch())
    method.end_epoch(task, 0)
    other, _ = prepare(**options)
    other.load_state_dict(method.state_dict())
    assert other.inverse_kappa == method.inverse_kappa == 0.5


def test_the_accuracy_of_drawn_gates_is_measured_too():
    method, task = prepare(evaluate_every=1, epochs=1)

    class Held:
        num_classes = 10
        held_out = 1

        def accuracy(self, run):
            return float(run(batch()[0]).detach().abs().sum())

    task.data = Held()
    with torch.no_grad():
        method.theta.fill_(0.75)
    metrics = method.end_epoch(task, 0)
    gates = method.sample(task.seed).detach()
    expected = task.masked(batch()[0], method.placement.spread(gates))
    assert metrics["proxy_accuracy_of_drawn_gates"] == pytest.approx(float(expected.detach().abs().sum()), rel=1e-5)
    assert metrics["proxy_accuracy"] != metrics["proxy_accuracy_of_drawn_gates"]


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"variant": "paper", "groups": "all", "sampling": "deterministic", "learning_rate": 0.05}]
)
def test_contract(options):
    check_method(DMC, **QUICK, **options)


@pytest.mark.slow
def test_contract_in_two_processes():
    check_method(DMC, distributed=True, learning_rate=0.05, **QUICK)
