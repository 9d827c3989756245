"""The terms of DDNP's released code: which gradient goes where, the ranking, and the optimiser."""

from __future__ import annotations

import math

import pytest
import torch

import fastprune as fp
from fastprune.methods import Task
from fastprune.methods.gates.ddnp import DDNP, DDNPConfig
from fastprune.methods.gates.ddnp_release import ReleaseTerms, cosine_rate
from fastprune.methods.gates.ddnp_terms import GatedGroups
from fastprune.networks.masked import MaskedNetwork
from fastprune.ops import gumbel_gate, topk_mask
from fastprune.planning.budget import Budget
from fastprune.testing import network, sample_data, traced


def prepare(**options) -> tuple[DDNP, Task]:
    """Set up a method on the contract's test network."""
    task = Task(network(), traced(), Budget.parse("flops=0.5"))
    method = DDNP(DDNPConfig(variant="release", **options))
    method.setup(task)
    return method, task


def make_terms(sizes: list[int]) -> ReleaseTerms:
    groups = GatedGroups.build(torch.tensor(sizes))
    return ReleaseTerms(groups, learning_rate=1e-3, epochs=1, samples=8, batch_size=8, seed=3)


def test_masks_are_products_of_soft_masks_and_relaxed_gates():
    terms = make_terms([20, 40])
    raw, keep = torch.randn(60, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.3])
    terms.collect(torch.rand(60, generator=torch.Generator().manual_seed(1)))
    gates, hard = terms.masks(raw, keep)
    relaxed = gumbel_gate(raw, seed=3, step=0, temperature=0.4, base=3.0, hard=False)
    soft = topk_mask(terms.ranking(raw), keep, terms.groups.offsets, torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(gates, (soft + 0.025).clamp(max=1) * relaxed)
    assert torch.equal(hard, (relaxed >= 0.5).float())
    assert 0 < float(gates.min()) < 0.03  # no gate closes completely
    counts = torch.tensor([float(hard[:20].sum()), float(hard[20:].sum())])
    torch.testing.assert_close(terms.widths(hard, keep), (counts + torch.tensor([10.0, 12.0])) / 2)


def test_a_width_gets_the_mean_gradient_of_its_channels():
    terms = make_terms([4, 6])
    raw = torch.randn(10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    keep = torch.tensor([0.5, 0.5], requires_grad=True)
    gates, _ = terms.masks(raw, keep)
    upstream = torch.randn(10, generator=torch.Generator().manual_seed(1))
    of_keep, of_raw = torch.autograd.grad((gates * upstream).sum(), [keep, raw])
    relaxed = gumbel_gate(raw.detach(), seed=3, step=0, temperature=0.4, base=3.0, hard=False)
    per_channel = upstream * relaxed
    torch.testing.assert_close(of_keep, torch.stack([per_channel[:4].mean(), per_channel[4:].mean()]))
    assert bool((of_raw != 0).all())


def test_the_cost_reaches_both_generators_and_the_pursuit_only_the_widths():
    terms = make_terms([8, 8])
    raw = torch.full((16,), -3.0, requires_grad=True)  # σ'(·) is largest here
    keep = torch.tensor([0.9, 0.2], requires_grad=True)
    _, hard = terms.masks(raw, keep)
    of_raw, of_keep = torch.autograd.grad(terms.widths(hard, keep).sum(), [raw, keep])
    torch.testing.assert_close(of_keep, torch.tensor([4.0, 4.0]))
    assert bool((of_raw > 0).any())
    _, hard = terms.masks(raw, keep)
    of_raw, of_keep = torch.autograd.grad(terms.pursuit(hard, keep), [raw, keep], allow_unused=True)
    assert of_raw is None
    part = hard.detach().view(2, 8).mean(1)
    for slope, width, target in zip(of_keep, keep.tolist(), part.tolist(), strict=True):
        if abs(width - target) > 0.02:
            assert math.copysign(1, float(slope)) == math.copysign(1, width - target)


def test_the_ranking_is_a_moving_average_of_importance():
    terms = make_terms([3])
    terms.collect(torch.tensor([1.0, 4.0, 2.0]))
    raw, keep = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.5])
    terms.masks(raw, keep)
    energies = torch.tensor([0.25, 1.0, 0.5])
    torch.testing.assert_close(terms.relative_energy(), energies)
    first, second = (
        (gumbel_gate(raw, seed=3, step=step, temperature=1.0, base=3.0, hard=False) + energies) / 2 for step in (0, 1)
    )
    torch.testing.assert_close(terms.ranking(raw), first)
    terms.masks(raw, keep)
    torch.testing.assert_close(terms.ranking(raw), 0.99 * first + 0.01 * second)


def test_energies_are_zero_where_channels_are():
    task = Task(network(), traced(), Budget.parse("flops=0.5"))
    images, _ = next(iter(sample_data().batches("train", 8)))
    masked = MaskedNetwork(task.graph, task.model)
    energies = masked.energies(images)
    assert bool((energies >= 0).all())
    # A channel that is always 0 has energy 0, and d(loss)/d(gate) is 0 there.
    gates = torch.ones(task.graph.num_units, requires_grad=True)
    weights = torch.randn(masked(images, gates).shape, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((masked(images, gates) * weights).sum(), gates)
    assert bool((slope[energies == 0] == 0).all())
    assert bool((energies > 0).any())
    torch.testing.assert_close(masked.energies(torch.cat([images, images])), energies)


def test_energies_of_a_known_network():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1))
    graph = fp.trace(model.eval(), torch.zeros(1, 1, 4, 4))
    images = torch.full((2, 1, 4, 4), 2.0)
    images[1] = -1.0
    # relu(2w) and relu(-w): channel 0 is 2 and 0, channel 1 is 0 and 2, channel 2 is 6 and 0.
    torch.testing.assert_close(MaskedNetwork(graph, model).energies(images), torch.tensor([2.0, 2.0, 18.0]))


def test_optimiser_and_schedule_of_the_release():
    method, task = prepare(epochs=4, learning_rate=0.01)
    scores, widths = method.optimizer.param_groups
    assert isinstance(method.optimizer, torch.optim.AdamW)
    assert (scores["weight_decay"], widths["weight_decay"]) == (1e-4, 0)
    rates = []
    for epoch in range(4):
        method.end_epoch(task, epoch)
        rates.append(widths["lr"])
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * e / 4)) / 2 for e in (1, 2, 3, 4)])
    assert scores["lr"] == 0.01
    assert cosine_rate(1.0, 0, 7) == 1


def test_a_search_measures_features_first_and_meets_the_budget():
    method, task = prepare(epochs=1, samples=64, batch_size=32)
    features, search = method.phases(task)
    images, labels = next(iter(sample_data().batches("train", 32)))
    assert (features.name, search.name) == ("features", "generators")
    features.step(images, labels)
    assert isinstance(method.terms, ReleaseTerms)
    energy = task.masked.energies(images)[method.placement.index]
    torch.testing.assert_close(method.terms.energy, energy)
    before = [parameter.detach().clone() for parameter in method.parameters]
    metrics = search.step(images, labels)
    assert all(bool((a != b).any()) for a, b in zip(before, method.parameters, strict=True))
    assert math.isfinite(float(metrics["loss"]))
    plan = method.plan(task)
    assert float(task.budget.cost(task.graph, plan.mask)) <= task.budget.limit(task.graph)


def test_hard_gates_draw_no_noise():
    """Evaluation and plan do not depend on a draw."""
    method, task = prepare()
    images, labels = next(iter(sample_data().batches("train", 16)))
    method.step_on(task, images, labels)
    assert torch.equal(method.gates(), method.gates())
    assert set(method.gates().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5}, {"window": 0.0}, {"output": "abs"}, {"noise": 0.0}, {"schedule": "cosine"}]
)
def test_options_of_the_paper_only_are_refused(options):
    with pytest.raises(ValueError, match=f"ddnp: {next(iter(options))} .* has no effect with variant 'release'"):
        prepare(**options)
