"""Compensation on small networks: what can be restored is, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.engine import RunDirectory
from fastprune.graph import ChannelGraph
from fastprune.host.distributed import Distributed
from fastprune.recovery import compensate, compensate_weights
from fastprune.recovery.compensation import How
from fastprune.recovery.statistics import measure_statistics
from fastprune.recovery.walk import Walk
from fastprune.surgery import cut


def batches(count: int = 8, size: int = 8, shape: tuple[int, ...] = (3, 16, 16)) -> list[tuple[Tensor]]:
    """Images with correlated pixels, as photographs have."""
    return [(F.avg_pool2d(torch.randn(size, *shape), 5, 1, 2) * 5,) for _ in range(count)]


def half(graph: ChannelGraph) -> Tensor:
    """Keep every second unit of every group."""
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[group.start + 1 : group.start + group.size : 2] = 0
    return mask


def distance(network: nn.Module, reference: nn.Module, images: list[tuple[Tensor]]) -> float:
    with torch.no_grad():
        pairs = [(network(*x), reference(*x)) for x in images]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum((b - b.mean(0)).square().sum() for _, b in pairs))


def test_later_kinds_come_closer(randomised: Callable[[nn.Module], nn.Module]) -> None:
    net = randomised(nn.Sequential(
        nn.Conv2d(3, 48, 3, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )).eval()  # fmt: skip
    graph = fp.trace(net, torch.randn(2, 3, 16, 16))
    plan = graph.plan(half(graph))
    calibration, held_out = batches(), batches()
    errors = {}
    for how in ("none", "mean", "one_pass", "sequential"):
        changed, _ = compensate_weights(graph, net, plan, calibration, how)  # type: ignore[arg-type]
        compact = cut(plan, changed, graph.traced)
        assert compact.difference < 2e-6
        errors[how] = distance(compact.model, net, held_out)
    assert errors["mean"] < errors["none"]
    assert errors["one_pass"] < 0.5 * errors["mean"]
    assert errors["sequential"] < errors["one_pass"]


@pytest.mark.parametrize("how", ["one_pass", "sequential"])
def test_copies_of_channels_are_restored_to_the_last_digits(how: How) -> None:
    """Every channel has a twin; a reader that knows one of them knows both."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval()
    with torch.no_grad():
        net[0].weight[1::2] = net[0].weight[::2]
    graph = fp.trace(net, torch.randn(2, 3, 16, 16))
    plan = graph.plan(half(graph))
    compact = compensate(net, plan, [x for (x,) in batches()], how, graph=graph)
    assert distance(fp.apply(plan, net), net, batches()) > 0.1
    assert distance(compact, net, batches()) < 1e-6  # of the variance, so 1e-3 of the outputs; the ridge leaves that


def test_constant_channels_become_a_shift() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    with torch.no_grad():
        net[0].weight[1::2] = 0
        net[0].bias[1::2] = torch.rand(4) + 1
    graph = fp.trace(net, torch.randn(2, 3, 16, 16))
    plan = graph.plan(half(graph))
    assert distance(compensate(net, plan, [x for (x,) in batches()], "mean"), net, batches()) < 1e-10


@pytest.mark.parametrize("how", ["mean", "one_pass", "sequential"])
def test_depthwise_and_grouped_layers_without_shifts(how: How) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.ReLU(),
        nn.Conv2d(16, 12, 3, padding=1, groups=2, bias=False), nn.ReLU(),
        nn.Conv2d(12, 5, 1, bias=False),
    ).eval()  # fmt: skip
    graph = fp.trace(net, torch.randn(2, 3, 16, 16))
    plan = graph.plan(half(graph))
    changed, work = compensate_weights(graph, net, plan, batches(), how)
    if how == "mean":
        assert set(work.skipped.values()) == {"nothing shifts its outputs"}
        return
    assert not work.skipped
    compact = cut(plan, changed, graph.traced).model
    assert distance(compact, net, batches()) < 0.9 * distance(fp.apply(plan, net), net, batches())


def test_the_model_and_closed_outputs_stay(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.randn(2, 3, 16, 16))
    plan = graph.plan(half(graph))
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    changed, work = compensate_weights(graph, tiny, plan, batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    assert work.fitted == 8  # all but the stem, which reads the image
    assert torch.equal(changed.stem[0].weight, tiny.stem[0].weight)  # type: ignore[index, union-attr]
    closed = torch.arange(1, 12, 2)
    assert torch.equal(changed.conv1.weight[closed], tiny.conv1.weight[closed])  # type: ignore[index]
    assert torch.equal(changed.bn1.running_mean[closed], tiny.bn1.running_mean[closed])  # type: ignore[index]


def test_a_weight_that_is_used_twice_stays_and_is_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.shared(torch.relu(self.shared(torch.relu(self.first(x))))))

    net = Twice().eval()
    graph = fp.trace(net, torch.randn(2, 3, 16, 16))
    changed, work = compensate_weights(graph, net, graph.plan(half(graph)), batches())
    assert work.skipped == {"shared": "its weight is used more than once"}
    assert work.fitted == 1
    assert torch.equal(changed.shared.weight, net.shared.weight)  # type: ignore[union-attr]


def test_overwritten_values(randomised: Callable[[nn.Module], nn.Module]) -> None:
    """An in-place operator that cannot be replaced must not let one network write into the other's values."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.relu(self.a(x)))
            alias = x.view(x.shape)
            F.relu(x, inplace=True)
            return self.c(alias)

    net = randomised(InPlace()).eval()
    graph = fp.trace(net, torch.randn(2, 3, 16, 16))
    mask = torch.ones(graph.num_units)
    mask[1 : graph.groups[0].size : 2] = 0  # of a; the values of b are overwritten
    images = batches()
    walk = Walk(graph, net, net, images)
    assert not walk.shares
    compact = compensate(net, graph.plan(mask), [x for (x,) in images], graph=graph)
    assert distance(compact, net, images) < 0.5 * distance(fp.apply(graph.plan(mask), net), net, images)


def test_batch_norms_measure_their_statistics_again(tiny: nn.Module) -> None:
    images = batches()
    measure_statistics(tiny, images, Distributed())
    with torch.no_grad():
        seen = [tiny.stem[0](x) for (x,) in images]  # type: ignore[index, operator]
    means = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(tiny.stem[1].running_mean, means)  # type: ignore[index, union-attr]
    torch.testing.assert_close(tiny.stem[1].running_var, variances)  # type: ignore[index, union-attr]
    assert not any(module.training for module in tiny.modules())


def test_what_is_refused(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.randn(2, 3, 16, 16))
    plan = graph.plan(half(graph))
    with pytest.raises(ValueError, match="compensate: got 'exact'; choose one of sequential"):
        compensate_weights(graph, tiny, plan, batches(), "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got no calibration images"):
        compensate_weights(graph, tiny, plan, [])


def test_prune_compensates_and_says_so(randomised: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    net = randomised(nn.Sequential(
        nn.Conv2d(3, 48, 3, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )).eval()  # fmt: skip
    images = [x for (x,) in batches()]
    loader = [(x, torch.zeros(len(x), dtype=torch.long)) for x in images]
    example = torch.zeros(1, 3, 16, 16)
    raw = fp.prune(net, example, method="l1", data=loader)
    result = fp.prune(
        net, example, method="l1", data=loader, compensate="sequential", calibration=64, out=tmp_path / "run"
    )
    assert torch.equal(raw.plan.mask, result.plan.mask)
    assert result.metrics["compensation"] == {"how": "sequential", "fitted": 2, "shifted": 0, "skipped": {}}
    assert distance(result.model, net, batches()) < 0.5 * distance(raw.model, net, batches())
    config = RunDirectory.open(tmp_path / "run").config
    assert (config["compensate"], config["calibration"]) == ("sequential", 64)
    assert RunDirectory.open(tmp_path / "run").metrics()[-1]["compensation"]["fitted"] == 2
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(fp.load(tmp_path / "run", model=net)(x), result.model(x))
    again = fp.compensate(net, result.plan, loader, images=64)
    torch.testing.assert_close(again(x), result.model(x))


def test_prune_refuses_to_compensate_without_images(tiny: nn.Module) -> None:
    example = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="compensate 'sequential' needs calibration images: give data="):
        fp.prune(tiny, example, method="l1", compensate="sequential")
    with pytest.raises(ValueError, match="compensate: got 'no'"):
        fp.prune(tiny, example, method="l1", compensate="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibration: got 0"):
        fp.prune(tiny, example, method="l1", compensate="bn", data=[], calibration=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5"])
def test_networks_with_attention_over_channels_and_rewritten_graphs(name: str) -> None:
    torch.manual_seed(0)
    model = fp.models.create(name, num_classes=10).eval()
    images = [torch.randn(8, 3, 64, 64) for _ in range(4)]
    for _ in range(2):
        measure_statistics(model, [(x,) for x in images], Distributed())  # so that random weights give varied outputs
    plan = fp.prune(model, images[0], method="l1", budget="flops=0.6").plan
    compact = fp.compensate(model, plan, images)  # verified against the masked model with the same weights
    held_out = [(torch.randn(8, 3, 64, 64),) for _ in range(2)]
    assert distance(compact, model, held_out) < distance(fp.apply(plan, model), model, held_out)
