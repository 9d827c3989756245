"""DDNP: which gradient reaches which generator, masks, the plan, and the paper's dynamics without data."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastprune import Limits, models
from fastprune.graph import trace
from fastprune.methods import Task, interior_units
from fastprune.methods.gates.ddnp import DDNP, DDNPConfig
from fastprune.methods.gates.ddnp_terms import MaskTerms
from fastprune.methods.gates.generators import ScoreGenerator, WidthGenerator
from fastprune.methods.gates.regularisers import one_sided, two_sided
from fastprune.ops import gumbel_gate, topk_mask
from fastprune.planning.budget import Budget, BudgetError
from fastprune.testing import check_method, network, photograph, sample_data, traced

QUICK = {"epochs": 2, "samples": 96, "batch_size": 32, "evaluate_every": 2}


def prepare(budget: str = "flops=0.5", seed: int = 0, **options) -> tuple[DDNP, Task]:
    """Set up a method on the contract's test network, by default as in the paper."""
    task = Task(network(), traced(), Budget.parse(budget), seed=seed)
    method = DDNP(DDNPConfig(**{"variant": "paper", **options}))
    method.setup(task)
    return method, task


def batch(skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batches = iter(sample_data().batches("train", 16))
    for _ in range(skip):
        next(batches)
    return next(batches)


def spread_scores(method: DDNP, seed: int = 0) -> None:
    """Move the generators' parameters, so that scores and widths differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "paper"},
        {"architecture": "channel", "resource": "one_sided", "groups": "all", "closing": 0.5},
        pytest.param({"variant": "release"}, marks=pytest.mark.slow),
    ],
)
def test_contract(options):
    check_method(DDNP, **QUICK, **options)


@pytest.mark.slow
def test_contract_in_two_processes():
    check_method(DDNP, distributed=True, **QUICK)


def test_options_of_the_paper():
    method, _ = prepare()
    config = method.config
    assert (config.regularisation, config.coupling, config.temperature, config.window) == (2, 2, 0.4, 0.1)
    assert (config.epochs, config.samples, config.learning_rate, config.output) == (200, 2500, 1e-3, "sigmoid")
    assert (config.architecture, config.resource, config.score_bias) == ("gru", "one_sided", 0)
    assert (config.noise, config.schedule) == (0, "constant")


def test_the_default_has_noise_two_sides_and_twice_the_weight_of_the_paper():
    config = DDNPConfig().resolve()
    assert (config.noise, config.regularisation, config.coupling, config.resource) == (0.3, 4, 2, "two_sided")


def test_a_state_of_scores_of_another_scale_is_refused():
    """Earlier versions had the scores themselves as parameters, by the name ``scores``."""
    method, _ = prepare(architecture="channel")
    state = method.state_dict()
    state["scores"] = {"scores": state["scores"]["parts"]}
    with pytest.raises(ValueError, match="the state is for other gates"):
        method.load_state_dict(state)


@pytest.mark.parametrize("divided", [True, False])
def test_one_parameter_per_channel_moves_as_far_as_the_generators(divided):
    moved = {}
    for architecture in ("gru", "channel"):
        generator = ScoreGenerator([64, 200], architecture, 0, divided=divided)
        optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
        before = generator().detach()
        generator().sum().backward()
        optimizer.step()
        moved[architecture] = (float((generator().detach() - before).abs().mean()), float(before.std()))
    for ours, theirs in zip(moved["channel"], moved["gru"], strict=True):
        assert 0.7 < ours / theirs < 1.1


# --- noise and schedule -----------------------------------------------------------------------------------------------


def test_a_step_ranks_by_noisy_scores_and_a_plan_does_not():
    method, _ = prepare(variant="perturbed", noise=0.5, window=0.0)
    assert isinstance(method.terms, MaskTerms)
    raw, keep = method.raw_scores().detach().requires_grad_(), torch.full_like(method.keep(), 0.5)
    masks = []
    for step in range(3):
        method.terms.steps = step
        # σ(0 + G) of the same draw is the noise's place in its distribution.
        noise = torch.logit(gumbel_gate(torch.zeros_like(raw), seed=0, step=step, temperature=1.0, base=0.0,
                                        hard=False, noise="logistic"))  # fmt: skip
        mask = method.terms.mask(raw, keep)
        torch.testing.assert_close(method.terms.draw(raw), torch.sigmoid(raw + 0.5 * noise), rtol=1e-4, atol=1e-5)
        assert torch.equal(mask, topk_mask(raw + 0.5 * noise, keep, method.groups.offsets))
        (slope,) = torch.autograd.grad(mask.sum(), raw)  # straight-through to σ(s̄ + τ G)
        noisy = torch.sigmoid(raw + 0.5 * noise).detach()
        torch.testing.assert_close(slope, noisy * (1 - noisy), rtol=1e-4, atol=1e-5)
        masks.append(mask.detach())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    assert torch.equal(method.gates(), topk_mask(torch.sigmoid(raw), method.keep(), method.groups.offsets))


def test_each_step_draws_anew_also_after_a_restart():
    method, task = prepare(variant="perturbed")
    for skip in range(3):
        method.step_on(task, *batch(skip))
    other, _ = prepare(variant="perturbed")
    other.load_state_dict(method.state_dict())
    raw, keep = method.raw_scores(), method.keep()
    assert method.terms.steps == other.terms.steps == 3
    assert torch.equal(method.terms.mask(raw, keep), other.terms.mask(raw, keep))


def test_the_learning_rate_falls_to_zero():
    method, task = prepare(schedule="cosine", epochs=4, evaluate_every=0, learning_rate=0.01)
    rates = []
    for epoch in range(4):
        rates.append(method.optimizer.param_groups[0]["lr"])
        method.end_epoch(task, epoch)
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)])
    constant, task = prepare(epochs=4, evaluate_every=0, learning_rate=0.01)
    constant.end_epoch(task, 0)
    assert constant.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.5}, "the paper has no noise"),
        ({"variant": "perturbed", "output": "abs"}, "output 'abs' takes no noise"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prepare(**options)
    prepare(variant="perturbed", output="abs", noise=0.0)


# --- generators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "parameters"), [("gru", 2 * 3 * 128 * (64 + 128 + 2)), ("fc", 64 * 256 + 256)]
)
def test_score_generator(architecture, parameters):
    sizes = [16, 5, 32]
    generator = ScoreGenerator(sizes, architecture, seed=3)
    assert generator().shape == (53,)
    assert sum(p.numel() for p in generator.parameters()) == parameters + 2 * 256 + 256 * 53
    rows = generator.input[:, 0]
    torch.testing.assert_close(rows @ rows.T, torch.eye(3))
    assert not generator.input.requires_grad
    assert torch.equal(generator(), ScoreGenerator(sizes, architecture, seed=3)())
    assert not torch.equal(generator(), ScoreGenerator(sizes, architecture, seed=4)())


def test_generators_do_not_draw_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ScoreGenerator([4], "gru", 0)
    WidthGenerator(3, 0)
    assert torch.equal(torch.rand(3), expected)


def test_pruning_starts_near_the_full_network():
    for seed in range(3):
        keep = torch.sigmoid(WidthGenerator(27, seed)()).detach()
        assert 0.85 < float(keep.mean()) < 0.99


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(method: DDNP, task: Task, **which: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of a weighted sum of terms for the parameters of g_s and of g_k."""
    images, labels = batch()
    raw, keep = method.raw_scores(), method.keep()
    mask = method.terms.mask(raw, keep)
    terms = {
        "data": F.cross_entropy(task.masked(images, method.placement.spread(mask)), labels),
        "cost": one_sided(
            method.placement.ratio(method.cost(task, method.groups.sizes * keep)), method.placement.target
        ).float(),
        "coupling": method.terms.coupling(raw, keep),
    }
    loss = sum(weight * terms[name] for name, weight in which.items())
    found = torch.autograd.grad(loss, method.parameters, allow_unused=True, materialize_grads=True)
    count = len(list(method.scores.parameters()))
    return tuple(torch.cat([g.flatten() for g in part]) for part in (found[:count], found[count:]))


def test_the_data_reach_the_scores_and_the_cost_reaches_the_widths():
    method, task = prepare()
    spread_scores(method)
    of_scores, of_widths = gradients(method, task, data=1.0)
    assert float(of_scores.abs().max()) > 0
    assert float(of_widths.abs().max()) == 0
    of_scores, of_widths = gradients(method, task, cost=1.0)
    assert float(of_scores.abs().max()) == 0
    assert float(of_widths.abs().max()) > 0
    of_scores, of_widths = gradients(method, task, coupling=1.0)
    assert float(of_scores.abs().max()) > 0
    assert float(of_widths.abs().max()) > 0


def test_a_step_follows_these_gradients_and_widths_ignore_the_batch():
    expected = None
    for skip in (0, 1):
        method, task = prepare(learning_rate=0.0)
        spread_scores(method)
        method.step_on(task, *batch(skip))
        count = len(list(method.scores.parameters()))
        got = torch.cat([p.grad.flatten() for p in method.parameters[count:]])
        if expected is None:
            expected = got
            of_scores, of_widths = gradients(method, task, data=1.0, cost=2.0, coupling=2.0)
            torch.testing.assert_close(got, of_widths)
            torch.testing.assert_close(torch.cat([p.grad.flatten() for p in method.parameters[:count]]), of_scores)
        else:
            assert torch.equal(got, expected)


def test_autocast_leaves_generators_and_masks_in_float32(monkeypatch):
    # bfloat16 has 8 bits: scores would tie, and indices would decide which channels are open.
    method, task = prepare()
    seen = []
    original = method.terms.mask
    monkeypatch.setattr(method.terms, "mask", lambda raw, keep: seen.append((raw, keep)) or original(raw, keep))
    (phase,) = method.phases(task)
    raw, keep = method.raw_scores(), method.keep()
    with torch.autocast("cpu", torch.bfloat16):
        phase.step(*batch())
    assert torch.equal(seen[0][0], raw)
    assert torch.equal(seen[0][1], keep)


def test_the_gradient_of_scores_is_that_of_the_mask():
    method, task = prepare(groups="all")
    spread_scores(method)
    images, labels = batch()
    raw = method.raw_scores().detach()
    scores = torch.sigmoid(raw).requires_grad_()
    mask = method.terms.mask(raw.requires_grad_(), torch.full_like(method.keep(), 0.5))
    (of_raw,) = torch.autograd.grad(F.cross_entropy(task.masked(images, mask), labels), raw)
    gates = mask.detach().requires_grad_()
    (of_mask,) = torch.autograd.grad(F.cross_entropy(task.masked(images, gates), labels), gates)
    through_sigmoid = scores * (1 - scores)
    torch.testing.assert_close(of_raw, of_mask * through_sigmoid.detach())
    assert bool((of_raw[mask.detach() == 0] != 0).any())  # closed gates learn too


@pytest.mark.parametrize("output", ["sigmoid", "abs", "square"])
def test_masks_follow_the_output_function(output):
    method, _ = prepare(output=output, window=0.0)
    spread_scores(method)
    raw, keep = method.raw_scores().detach(), torch.full_like(method.keep(), 0.5)
    mask = method.terms.mask(raw, keep).detach()
    ranked_by = {"sigmoid": raw, "abs": raw.abs(), "square": raw.abs()}[output]
    for begin, end in zip(method.groups.offsets[:-1].tolist(), method.groups.offsets[1:].tolist(), strict=True):
        part, kept = ranked_by[begin:end], mask[begin:end] == 1
        assert int(kept.sum()) == (end - begin) // 2
        assert part[kept].min() >= part[~kept].max()


def test_windows_are_a_tenth_of_the_channels():
    graph = trace(models.create("resnet56"), torch.zeros(1, 3, 32, 32))
    method = DDNP(DDNPConfig())
    method.setup(Task(models.create("resnet56"), graph, Budget("flops", 0.5)))
    assert method.terms.windows.tolist() == [2] * 9 + [3] * 9 + [6] * 9
    mask = method.terms.mask(method.raw_scores(), torch.full((27,), 0.5)).detach()
    sums = torch.zeros(27).index_add(0, method.groups.owner, mask)
    bound = 3 / (math.pi**3 * method.terms.windows**2) + 1e-5
    assert bool(((sums - 0.5 * method.groups.sizes).abs() <= bound).all())


def test_windows_can_close():
    """With closing 0.5 they close over the last half of ten epochs, to 0 in the last one."""
    method, task = prepare(epochs=10, closing=0.5, evaluate_every=0)
    edges = [method.terms.edge]
    for epoch in range(10):
        method.end_epoch(task, epoch)
        edges.append(method.terms.edge)
    assert edges == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0])
    keep = torch.full((len(method.groups.sizes),), 0.5)
    mask = method.terms.mask(method.raw_scores(), keep)
    assert set(mask.tolist()) == {0.0, 1.0}
    fresh, _ = prepare(epochs=10, closing=0.5)
    fresh.load_state_dict(method.state_dict())
    assert fresh.terms.edge == 0
    assert prepare(epochs=1, closing=0.01)[0].terms.edge == 0
    soft, _ = prepare(window=0.5)
    assert len(set(soft.terms.mask(soft.raw_scores(), keep).tolist())) > 2


# --- the terms --------------------------------------------------------------------------------------------------------


def test_cost_terms():
    ratio = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    value = one_sided(ratio, 0.5)
    (slope,) = torch.autograd.grad(value, ratio)
    assert float(value.detach()) == pytest.approx(math.log(0.6 / 0.5))
    assert float(slope) == pytest.approx(1 / 0.6)
    below = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(one_sided(below, 0.5), below)
    assert float(one_sided(below, 0.5).detach()) == 0
    assert float(slope) == 0
    (slope,) = torch.autograd.grad(two_sided(below, 0.5), below)
    assert float(slope) == pytest.approx(-1 / 0.4)


def test_the_coupling_equals_eq_5():
    method, _ = prepare()
    spread_scores(method)
    raw, keep = method.raw_scores().detach().double(), method.keep().detach().double()
    expected = 0.0
    for k, begin, end in zip(
        keep, method.groups.offsets[:-1].tolist(), method.groups.offsets[1:].tolist(), strict=True
    ):
        expected += float((k - torch.sigmoid(raw[begin:end] / 0.4).mean()) ** 2)
    assert float(method.terms.coupling(raw, keep)) == pytest.approx(expected, rel=1e-6)


def test_the_cost_of_widths_equals_that_of_masks():
    method, task = prepare("params=0.6", groups="all")
    keep = torch.tensor([0.5 if size % 2 == 0 else 1.0 for size in method.groups.sizes.tolist()])
    mask = method.terms.mask(method.raw_scores(), keep).detach()
    hard = (mask > 0.5).double()
    assert float(method.cost(task, method.groups.sizes * keep).detach()) == pytest.approx(
        float(task.budget.cost(task.graph, method.placement.spread(hard)))
    )


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_keeps_the_channels_of_highest_score():
    method, task = prepare("flops=0.6")
    spread_scores(method)
    plan = method.plan(task)
    scores = torch.zeros(task.graph.num_units)
    scores[method.placement.index] = method.current_scores()
    inside = interior_units(task.graph)
    assert bool(plan.mask[~inside].all())
    for group in task.graph.groups:
        part, kept = scores[group.units], plan.mask[group.units]
        if not bool(kept.all()):
            assert part[kept].min() >= part[~kept].max()


def test_one_shift_brings_all_widths_onto_the_budget():
    method, task = prepare("flops=0.6")
    with torch.no_grad():
        method.widths.linear.weight.zero_()  # k = sigmoid(3) everywhere, far above the budget
    plan = method.plan(task)
    ratios = [kept / size for name, (kept, size) in plan.widths.items() if kept < size]
    assert len(ratios) == len(method.groups.sizes)
    assert max(ratios) - min(ratios) < 4 / int(method.groups.sizes.min())  # rounding, and channels that fill the budget
    assert method.results()["flops_of_widths"] > 0.6 >= method.results()["flops_of_plan"] > 0.59


def test_limits_hold():
    task = Task(network(), traced(), Budget.parse("flops=0.7"), limits=Limits(round_to=4, min_keep=8))
    method = DDNP(DDNPConfig())
    method.setup(task)
    spread_scores(method)
    assert task.limits.broken_by(task.graph, method.plan(task).mask) is None


def test_an_infeasible_budget_is_refused_before_the_search():
    with pytest.raises(BudgetError, match="remains"):
        prepare("params=0.002")


def test_weights_and_statistics_do_not_change():
    method, task = prepare()
    before = photograph(task.model)
    for skip in range(2):
        method.step_on(task, *batch(skip))
    after = photograph(task.model)
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    assert not after.gradients
    assert before.requires_grad == after.requires_grad


def test_a_state_for_other_gates_is_refused():
    state = prepare(groups="all")[0].state_dict()
    with pytest.raises(ValueError, match="the state is for other gates"):
        prepare()[0].load_state_dict(state)
    with pytest.raises(ValueError, match="the state is for other gates"):
        prepare(groups="all", architecture="channel")[0].load_state_dict(state)


# --- without data -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resource", "target", "low", "high"),
    [("one_sided", 0.5, 0.40, 0.5), ("one_sided", 0.7, 0.62, 0.7), ("two_sided", 0.5, 0.49, 0.51)],
)
def test_cost_and_coupling_alone(resource, target, low, high):
    """On ResNet-56 without data the one-sided term overshoots, as nothing pulls back; the two-sided one does not."""
    model = models.create("resnet56")
    graph = trace(model, torch.zeros(1, 3, 32, 32))
    task = Task(model, graph, Budget("flops", target))
    method = DDNP(DDNPConfig(resource=resource))
    method.setup(task)
    for _ in range(1500):
        raw, keep = method.raw_scores(), method.keep()
        ratio = method.placement.ratio(method.cost(task, method.groups.sizes * keep))
        term = {"one_sided": one_sided, "two_sided": two_sided}[resource](ratio, method.placement.target)
        loss = 2 * term.float() + 2 * method.terms.coupling(raw, keep)
        for parameter, gradient in zip(method.parameters, torch.autograd.grad(loss, method.parameters), strict=True):
            parameter.grad = gradient
        method.optimizer.step()
    assert low <= float(ratio.detach()) <= high
