"""GCP: scores independent of scaling, exact costs, and the changes of each half of a round."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from fastprune.data import UserData
from fastprune.engine import HeldOut, Placement
from fastprune.graph import ChannelGraph, trace
from fastprune.host.distributed import Distributed
from fastprune.methods import Metrics, Task
from fastprune.methods.gcp.closable import find_closable_units
from fastprune.methods.gcp.folding import fold_constants
from fastprune.methods.gcp.gcp import GCP, costs
from fastprune.methods.gcp.scales import Scales
from fastprune.methods.registry import configure
from fastprune.methods.scores.filters import unit_batch_norms, unit_norms
from fastprune.networks.masked import MaskedNetwork
from fastprune.planning.budget import Budget
from fastprune.planning.fitting import fit
from fastprune.testing import check_method, network, sample_data, traced

QUICK: dict[str, Any] = {"rounds": 2, "batch_size": 32, "penalties": (0.5,)}


def make_task(model: nn.Module, graph: ChannelGraph, budget: str = "flops=0.5") -> Task:
    data = HeldOut(sample_data(), Placement(), Distributed())
    return Task(model, graph, Budget.parse(budget), data=data)


def prepare(budget: str = "flops=0.5", **options: Any) -> tuple[GCP, Task]:
    """Set up a method on the contract's test network."""
    task = make_task(network(), traced(), budget)
    method = GCP(configure(GCP, {**QUICK, **options}))
    method.setup(task)
    return method, task


def make_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return list(sample_data().batches("train", 32))[:count]


def run(method: GCP, task: Task) -> list[Metrics]:
    """Run all phases on four batches each; return the metrics of each at its end."""
    reported = []
    for phase in method.phases(task):
        for batch in make_batches(4):
            phase.step(*batch)
        assert phase.end_epoch is not None
        reported.append(phase.end_epoch(0))
    return reported


@pytest.mark.parametrize(
    "options",
    [
        {"penalties": (0.3, 1.0), "samples": 64},
        pytest.param(
            {"groups": "interior", "epochs": 2, "learning_rates": (0.01, 0.03), "slices": "geometric"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_contract(options: dict[str, Any]) -> None:
    check_method(GCP, **{**QUICK, **options})


@pytest.mark.slow
def test_contract_in_two_processes() -> None:
    check_method(GCP, distributed=True, **{**QUICK, "penalties": (0.3, 1.0)})


def test_sparsifying_changes_scales_shifts_and_linear_layers_only() -> None:
    """Batch norm is off: its statistics and the convolutions do not change by a bit (eq. 6)."""
    method, task = prepare()
    before = copy.deepcopy(task.model.state_dict())
    step = method.make_step(task, sparsify=True)
    for batch in make_batches(3):
        step(*batch)
    method.scales.write()
    norms = {n for n, m in task.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    free = {f"{n}.{p}" for n in norms for p in ("weight", "bias")} | {"classifier.weight"}
    changed = {n for n, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == free
    assert all(parameter.requires_grad for n, parameter in task.model.named_parameters() if n != "classifier.bias")


def test_recovery_updates_statistics_and_keeps_channels_closed() -> None:
    method, task = prepare(fold_bias=False)
    method.end_sparsify(task)
    closed = ~method.scales.open
    means = {n: b.clone() for n, b in task.model.named_buffers() if n.endswith("running_mean")}
    convolutions = {n: p.detach().clone() for n, p in task.model.named_parameters() if p.dim() == 4}
    step = method.make_step(task, sparsify=False)
    for batch in make_batches(3):
        step(*batch)
    method.end_recover(task)
    assert all(not torch.equal(dict(task.model.named_buffers())[n], mean) for n, mean in means.items())
    assert all(torch.equal(dict(task.model.named_parameters())[n], weight) for n, weight in convolutions.items())
    assert torch.equal(~method.scales.open, closed)
    task.model.eval()
    energies = MaskedNetwork(task.graph, task.model).energies(make_batches(1)[0][0])
    assert bool((energies[closed] == 0).all())
    assert float((energies[~closed] > 0).float().mean()) > 0.8  # the rest is dead behind relu


def test_each_round_meets_its_cost() -> None:
    method, task = prepare(rounds=4)
    full = float(task.budget.cost(task.graph))
    parts = []
    for _ in range(4):
        parts.append(float(method.end_sparsify(task)["flops_ratio"]))
        method.end_recover(task)
    for part, wanted in zip(parts, (0.875, 0.75, 0.625, 0.5), strict=True):
        assert wanted - 0.01 < part <= wanted
    plan = method.plan(task)
    assert float(task.budget.cost(task.graph, plan.mask)) / full == pytest.approx(parts[-1])


def test_geometric_rounds_fall_by_equal_factors() -> None:
    method, task = prepare("flops=0.25", slices="geometric")
    assert method.round_limit(task) == pytest.approx(0.5 * float(task.budget.cost(task.graph)))


def median_importance(method: GCP) -> Tensor:
    """Return the median of s, where a coupled channel's s is multiplied by the norm of its γ."""
    importance = method.scales.importance()
    return importance[importance > 0].median()


def test_one_step_is_a_gradient_step_and_a_soft_threshold() -> None:
    """For plain SGD on s·γ, γ' = soft(γ − η∂/s², ηλc/s), with s relative to its median and the network's gradients."""
    method, task = prepare(momentum=0.0, penalties=(0.05,))
    everything = torch.ones(task.graph.num_units, dtype=torch.bool)
    weights, readers = costs(task, everything, method.prunable_units), unit_norms(task.graph, task.model, roles=("in",))
    median = median_importance(method)
    model = copy.deepcopy(task.model).eval()
    images, labels = make_batches(1)[0]
    nn.functional.cross_entropy(model(images), labels).backward()
    method.make_step(task, sparsify=True)(images, labels)
    method.scales.write()
    expand = next(group for group in task.graph.groups if "block.0" in group.producers)  # passes one batch norm
    before, slope = model.block[1].weight.detach(), model.block[1].weight.grad
    scale = (readers[expand.units] / median).float()
    threshold = (0.01 * method.penalty * weights[expand.units] / scale).float()
    assert bool((threshold > 0).all())
    moved = before - 0.01 * slope / scale.square()
    assert torch.allclose(task.model.block[1].weight, moved.sign() * (moved.abs() - threshold).clamp(min=0), atol=1e-7)
    shift = model.block[1].bias
    moved = shift.detach() - 0.01 * shift.grad / scale.square()
    assert torch.allclose(task.model.block[1].bias, moved, atol=1e-7)


def test_training_does_not_depend_on_the_scaling_of_the_network() -> None:
    """A channel's γ, β times 5 and its readers divided by 5 make the same network (§4.1), which trains alike."""
    scores = []
    for factor in (1.0, 5.0):
        model = network().double()
        with torch.no_grad():
            model.block[1].weight[3] *= factor
            model.block[1].bias[3] *= factor
            model.block[3].weight[:, 3] /= factor
        graph = trace(model, torch.zeros(2, 3, 16, 16, dtype=torch.float64))
        task = make_task(model, graph)
        method = GCP(configure(GCP, QUICK))
        method.setup(task)
        step = method.make_step(task, sparsify=True)
        for images, labels in make_batches(4):
            step(images.double(), labels)
        scores.append(method.scales.magnitudes() * method.unit)
    assert torch.allclose(scores[0], scores[1], rtol=1e-6)


def test_coupled_channels_share_a_mask() -> None:
    """For an expansion and its depthwise convolution ∂/∂m = Σ γ ∂/∂γ + β ∂/∂β, and m multiplies both batch norms."""
    method, task = prepare(momentum=0.0, penalties=(0.0,))
    model = copy.deepcopy(task.model).eval()
    images, labels = make_batches(1)[0]
    nn.functional.cross_entropy(model(images), labels).backward()
    norms = model.expand[1], model.depthwise[1]
    slope = sum(p.detach() * p.grad for norm in norms for p in (norm.weight, norm.bias))
    group = next(group for group in task.graph.groups if "expand.0" in group.producers)
    scale = method.scales.importance()[group.units] / median_importance(method)
    method.make_step(task, sparsify=True)(images, labels)
    assert bool(method.scales.coupled[group.units].all())
    mask = method.scales.mask.detach()[group.units]
    assert torch.allclose(mask, 1 - 0.01 * slope / scale.square(), atol=1e-6)
    method.scales.write()
    expected = mask * (norms[1].weight - 0.01 * norms[1].weight.grad)
    assert torch.allclose(task.model.depthwise[1].weight, expected, atol=1e-6)


def test_scores_do_not_depend_on_the_scaling_of_the_network() -> None:
    """(γ, β, W) → (aγ, aβ, W/a) does not change a relu network or its scores (§4.1)."""
    plain, scaled = network(), network()
    graph = traced()
    with torch.no_grad():
        factors = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5
        scaled.block[1].weight.mul_(factors)
        scaled.block[1].bias.mul_(factors)
        scaled.block[3].weight.div_(factors[:, None, None])
    images = make_batches(1)[0][0]
    assert torch.allclose(plain(images), scaled(images), atol=1e-5)
    everything = torch.ones(graph.num_units, dtype=torch.bool)
    scores = []
    for model in (plain, scaled):
        scales = Scales(graph, model, everything)
        scores.append(scales.magnitudes() * scales.importance())
    assert torch.allclose(*scores, rtol=1e-5)


def test_the_penalty_has_no_effect_with_batch_norm_on() -> None:
    """Half of a layer's γ and β give the same loss under batch statistics, another under global ones (§4.3)."""
    model = network()
    model.last[0].bias = None
    images, labels = make_batches(1)[0]

    def losses() -> tuple[float, float]:
        clone = copy.deepcopy(model).double()
        values = [nn.functional.cross_entropy(clone.train(mode)(images.double()), labels) for mode in (False, True)]
        return values[0].item(), values[1].item()

    before = losses()
    with torch.no_grad():
        model.project[1].weight.mul_(0.5)
        model.project[1].bias.mul_(0.5)
    after = losses()
    assert after[1] == pytest.approx(before[1], rel=1e-4)  # the next batch norm's epsilon does not scale
    assert abs(after[0] - before[0]) > 1e-3


@pytest.mark.parametrize("resource", ["flops", "params"])
def test_costs_are_differences_of_compact_networks(resource: str) -> None:
    """They equal the measured costs of one channel less in the network after surgery."""
    model, graph = network(), traced()
    task = make_task(model, graph, f"{resource}=0.5")
    kept = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(3)) < 0.7
    for group in graph.groups:
        kept[group.start : group.start + 2] = True
    prunable = torch.ones_like(kept)

    def measured(mask: Tensor) -> float:
        compact = fp.apply(graph.plan(mask), model)
        if resource == "params":
            return float(sum(p.numel() for p in compact.parameters()))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            compact(torch.zeros(1, 3, 16, 16))
        return counter.get_total_flops() / 2

    whole = measured(kept)
    expected = torch.zeros(graph.num_units, dtype=torch.float64)
    for group in graph.groups:
        less = kept.clone()
        less[group.start] = False
        expected[group.units] = (whole - measured(less)) * kept[group.units]
    expected /= expected.sum() / kept.sum()
    assert torch.allclose(costs(task, kept, prunable), expected, rtol=1e-9)


def test_folding_is_exact_under_one_by_one_kernels() -> None:
    """A channel with γ = 0 is constant; with its contribution in the next running mean, closing it changes nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Hardswish(), nn.Conv2d(12, 8, 1, groups=2, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 14 * 14, 5),
    ).eval()  # fmt: skip
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    images = torch.randn(2, 3, 16, 16)
    graph = trace(model, images)
    closing = torch.zeros(graph.num_units, dtype=torch.bool)
    for group in graph.groups[:2]:
        closing[group.start : group.start + group.size : 2] = True
    with torch.no_grad():
        for norm in unit_batch_norms(graph, model):
            norm.module.weight[closing[norm.units]] = 0.0
    expected = model(images)
    masked = MaskedNetwork(graph, model)
    gates = 1.0 - closing.float()
    assert not torch.allclose(masked(images, gates), expected, atol=1e-3)
    assert fold_constants(graph, model, masked.network, closing) == 1.0
    assert torch.allclose(masked(images, gates), expected, atol=1e-5)


def test_channels_that_no_scale_closes_are_kept() -> None:
    """A sigmoid turns zero into a half, and batch norm does not close a shortcut around it."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.read = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
            self.plain, self.norm2, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.read(torch.sigmoid(self.norm(self.conv(x))))
            return self.last(self.norm2(y) + self.plain(x)).mean((2, 3))

    model = Odd().eval()
    graph = trace(model, torch.randn(2, 3, 8, 8))
    assert graph.num_units > 0
    assert not find_closable_units(graph, model, MaskedNetwork(graph, model)).any()
    with pytest.raises(ValueError, match="no scale of a batch norm closes a prunable channel"):
        GCP(configure(GCP, QUICK)).setup(make_task(model, graph))


def test_candidates_need_held_out_samples() -> None:
    method = GCP(configure(GCP, {**QUICK, "penalties": (0.1, 1.0)}))
    task = make_task(network(), traced())
    task.data = HeldOut(UserData([(torch.zeros(4, 3, 16, 16), torch.zeros(4).long())]), Placement(), Distributed())
    with pytest.raises(ValueError, match="hold some out, or give one value each"):
        method.setup(task)


def test_the_best_candidate_is_kept() -> None:
    """With one learning rate that diverges and one that does not, the weights of the latter are kept."""
    method, task = prepare(rounds=1, learning_rates=(30.0, 0.01))
    reported = run(method, task)
    losses = [metrics["held_out_loss"] for metrics in reported if "held_out_loss" in metrics]
    assert reported[-1]["best_lr"] == 0.01
    assert not losses[0] < losses[1]  # NaN
    task.model.eval()
    assert task.data is not None
    assert task.data.loss(task.model) == pytest.approx(float(losses[1]))


def test_a_losing_candidate_leaves_no_trace() -> None:
    """If the first of two candidates wins, the network is the same as without the second."""
    results = []
    for rates in ((0.01,), (0.01, 30.0)):
        method, task = prepare(rounds=1, learning_rates=rates)
        run(method, task)
        method.plan(task)
        results.append(dict(task.model.state_dict()))
    for name, tensor in results[0].items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, results[1][name]), name


def test_a_candidate_with_nan_scales_loses() -> None:
    method, task = prepare(learning_rates=(0.02, 0.01))
    with torch.no_grad():
        method.scales.gamma.fill_(torch.nan)
    assert method.end_sparsify(task)["flops_ratio"] <= 0.75
    assert method.end_recover(task)["held_out_loss"] != pytest.approx(0.0)
    assert method.best["loss"] == float("inf")
    assert bool(method.scales.gamma.isfinite().all())


def test_frozen_batch_norms_do_not_change() -> None:
    model = network()
    for parameter in model.block[1].parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.block[1].state_dict())
    task = make_task(model, traced())
    method = GCP(configure(GCP, QUICK))
    method.setup(task)
    run(method, task)
    mask = method.plan(task).mask.bool()
    frozen = next(group for group in task.graph.groups if "block.0" in group.producers)
    assert bool(mask[frozen.units].all())
    assert torch.equal(model.block[1].weight, before["weight"])
    assert torch.equal(model.block[1].bias, before["bias"])


def test_a_round_that_diverges_with_every_candidate_is_an_error() -> None:
    method, task = prepare(learning_rates=(30.0, 40.0))
    with pytest.raises(ValueError, match="round 1 diverged with every candidate; give smaller learning_rates"):
        run(method, task)


@pytest.fixture(scope="module")
def resnet50() -> tuple[nn.Module, ChannelGraph]:
    model = torchvision.models.resnet50().eval()
    return model, trace(model, torch.zeros(1, 3, 224, 224))


@pytest.mark.slow
def test_the_resource_decides_which_stages_shrink(resnet50: tuple[nn.Module, ChannelGraph]) -> None:
    """Figures 2 and 3: a budget of FLOPs prunes the early stages most, one of parameters the late ones.

    Importance is distributed alike in every layer and shrinks under the penalty as on a flat loss. The released
    ResNet-50 with 48 % fewer parameters, pruned for throughput, keeps 12, 25, 31 and 94 % of its four residual streams.
    """
    model, graph = resnet50
    importance = torch.cat([(torch.arange(group.size) + 0.5) / group.size for group in graph.groups]).double()
    everything = torch.ones(graph.num_units, dtype=torch.bool)
    stages: dict[str, list[float]] = {}
    for resource in ("flops", "params"):
        task = make_task(model, graph, f"{resource}=0.3")
        kept = everything
        for part in (0.72, 0.44, 0.3):
            left = (importance - 0.3 * costs(task, kept, everything)).clamp(min=0).masked_fill(~kept, -1)
            kept = fit(graph, Budget(task.budget.resource, part), left) & kept
        ratios = {group.name: float(kept[group.units].float().mean()) for group in graph.groups}
        rows = [[r for name, r in ratios.items() if name.startswith(f"layer{n}")] for n in (1, 2, 3, 4)]
        stages[resource] = [sum(row) / len(row) for row in rows]
    assert stages["flops"] == sorted(stages["flops"])
    assert stages["flops"][0] < 0.6 * stages["flops"][3]
    assert stages["params"] == sorted(stages["params"], reverse=True)
    assert stages["params"][3] < 0.6 * stages["params"][0]


def test_batch_norms_with_channels_outside_all_units() -> None:
    """A ResNet with padded shortcuts has batch norms with such channels."""
    torch.manual_seed(0)
    model, images = fp.models.create("resnet20"), torch.zeros(2, 3, 16, 16)
    assert any(bool((norm.units < 0).any()) for norm in unit_batch_norms(trace(model.eval(), images), model))
    result = fp.prune(model, images, method="gcp", budget="flops=0.6", data=sample_data(), samples=64, **QUICK)
    assert result.metrics["search"]["flops_ratio"] <= 0.6
    assert result.metrics["difference"] < 1e-5
