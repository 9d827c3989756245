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
from fastprune.recovery.norms import match
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


def test_one_pass_keeps_the_moments_of_batch_norms(randomised: Callable[[nn.Module], nn.Module]) -> None:
    """Every norm returns the full network's means and variances, whatever its statistics were."""
    net = randomised(nn.Sequential(
        nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )).eval()  # fmt: skip
    images = batches()
    graph = fp.trace(net, images[0][0])
    plan = graph.plan(half(graph))
    changed, _ = compensate_weights(graph, net, plan, images, "one_pass")
    everything = torch.cat([x for (x,) in images])
    with torch.no_grad():
        for end, group in ((5, graph.groups[1]), (8, graph.groups[2])):  # behind the second and the third norm
            stay = plan.mask[group.units]
            full, other = (model[:end](everything)[:, stay] for model in (net, fp.masked(changed, plan)))
            for moment in (torch.mean, torch.var):
                torch.testing.assert_close(moment(other, (0, 2, 3)), moment(full, (0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_norms_that_cannot_vary_are_shifted() -> None:
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    still = torch.tensor([1.0, 0.0], dtype=torch.float64)  # the second channel is constant in the full network
    mean, variance = match((2 * one, still), (5 * one, 4 * one), zero, one, 0.0)
    assert variance.tolist() == [4, 1]
    assert mean.tolist() == [1, 3]  # (5 - 1) / 2 = 2, and 5 - 3 = 2


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
    kept = torch.arange(0, 8, 2)  # the others are no longer read
    assert torch.equal(changed.shared.weight[:, kept], net.shared.weight[:, kept])  # type: ignore[index]
    assert (changed.shared.weight[:, 1::2] == 0).all()  # type: ignore[index]


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
    raw = fp.prune(net, example, method="l1", data=loader, compensate="none")
    assert "compensation" not in raw.metrics
    without_data = fp.prune(net, example, method="l1")
    assert without_data.settings["compensate"] == raw.settings["compensate"] == "none"
    result = fp.prune(net, example, method="l1", data=loader, calibration=64, out=tmp_path / "run")
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
    with pytest.raises(ValueError, match="compensate: got 'no'; choose one of auto, sequential"):
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


class Streams(nn.Module):
    """Sums of unlike shapes, a batch norm that two layers share, and one that closes its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Conv2d(16, 12, 3)
        self.shared, self.closed = nn.BatchNorm2d(12), nn.BatchNorm2d(12)
        self.gate, self.c, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 4, 1)
        nn.init.zeros_(self.closed.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = torch.relu(self.shared(self.a(x)) + self.shared(self.b(x)))
        y = y + self.gate(y.mean((2, 3), keepdim=True))
        y = torch.relu(y + self.closed(self.c(y)))
        return self.last(y)


@pytest.mark.parametrize("how", ["mean", "one_pass", "sequential"])
def test_shared_and_closed_norms_and_broadcast_sums(randomised: Callable[[nn.Module], nn.Module], how: How) -> None:
    net = randomised(Streams()).eval()
    nn.init.zeros_(net.closed.weight)  # type: ignore[arg-type]
    graph = fp.trace(net, torch.randn(2, 3, 16, 16))
    plan = graph.plan(half(graph))
    compact = compensate(net, plan, [x for (x,) in batches()], how, graph=graph)
    assert distance(compact, net, batches()) < distance(fp.apply(plan, net), net, batches())


def test_a_region_under_autocast_is_left_and_does_not_round_the_fit() -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = torch.relu(self.b(torch.relu(self.a(x))))
            return self.c(y.float())

    net = Region().eval()
    graph = fp.trace(net, torch.randn(2, 3, 16, 16))
    mask = torch.ones(graph.num_units)
    mask[1 : graph.groups[0].size : 2] = 0
    plan = graph.plan(mask)
    compact = compensate(net, plan, [x for (x,) in batches()], graph=graph)
    assert not torch.is_autocast_enabled("cpu")
    assert distance(compact, net, batches()) < 0.5 * distance(fp.apply(plan, net), net, batches())


def test_inputs_by_name_come_in_the_order_of_the_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 24, 3), nn.Conv2d(3, 24, 3), nn.Conv2d(24, 4, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(a) - 2 * self.b(b)))

    net = Two().eval()
    loader = [((x, 3 * x), torch.zeros(len(x))) for (x,) in batches()]
    plan = fp.prune(net, (torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)), method="l1").plan
    by_place = fp.compensate(net, plan, loader, forward=lambda m, x: (m(x[0][0], x[0][1]), x[1]))
    by_name = fp.compensate(net, plan, loader, forward=lambda m, x: (m(b=x[0][1], a=x[0][0]), x[1]))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(by_place(x, x), by_name(x, x))
    small = [((x[:, :, :8, :8], x[:, :, :8, :8]), y) for (x, _), y in loader]
    with pytest.raises(ValueError, match=r"the data give a, b of 3×8×8 float32.*traced with a, b of 3×16×16"):
        fp.compensate(net, plan, small, forward=lambda m, x: (m(*x[0]), x[1]))


def test_half_precision_is_fitted_in_float32() -> None:
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3)).eval().bfloat16()
    graph = fp.trace(net, torch.randn(2, 3, 16, 16, dtype=torch.bfloat16))
    plan = graph.plan(half(graph))
    images = [(x.bfloat16(),) for (x,) in batches()]
    compact = compensate(net, plan, [50 * x for (x,) in images], graph=graph)
    raw = fp.apply(plan, net)
    big = [(50 * x,) for (x,) in images]
    assert distance(compact, net, big) < 0.5 * distance(raw, net, big)


def test_layers_behind_a_skipped_one_make_up_for_it() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.ConvTranspose2d(24, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3)
    ).eval()  # fmt: skip
    graph = fp.trace(net, torch.randn(2, 3, 16, 16))
    mask = torch.ones(graph.num_units)
    mask[1 : graph.groups[0].size : 2] = 0  # of the first layer only
    plan = graph.plan(mask)
    changed, work = compensate_weights(graph, net, plan, batches())
    assert work.fitted == 1
    assert list(work.skipped) == ["2"]
    compact = cut(plan, changed, graph.traced).model
    assert distance(compact, net, batches()) < 0.9 * distance(fp.apply(plan, net), net, batches())


def test_a_plan_of_another_graph_is_refused(tiny: nn.Module) -> None:
    plan = fp.prune(tiny, torch.zeros(2, 3, 16, 16), method="l1", ignore=["conv1"], budget="flops=0.8").plan
    with pytest.raises(ValueError, match=r"give graph=result\.graph"):
        fp.compensate(tiny, plan, [x for (x,) in batches()])


def test_a_resumed_run_keeps_its_compensation(tiny: nn.Module, tmp_path: Path) -> None:
    loader = [(x, torch.zeros(len(x), dtype=torch.long)) for (x,) in batches()]
    arguments = {"method": "l1", "budget": "flops=0.8", "data": loader, "out": tmp_path / "run"}
    fp.prune(tiny, torch.zeros(2, 3, 16, 16), compensate="bn", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was begun with compensate 'bn', not 'sequential'"):
        fp.prune(tiny, torch.zeros(2, 3, 16, 16), resume=True, **arguments)  # type: ignore[arg-type]


def test_data_of_another_form_are_refused_before_the_search(tiny: nn.Module, tmp_path: Path) -> None:
    loader = [(x.double(), torch.zeros(len(x), dtype=torch.long)) for (x,) in batches()]
    example, out = torch.zeros(2, 3, 16, 16), tmp_path / "run"
    with pytest.raises(ValueError, match=r"the data give x of 3×16×16 float64, the network was traced with x of"):
        fp.prune(tiny, example, method="l1", data=loader, compensate="bn", out=out)
    assert not out.exists()
