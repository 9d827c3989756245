"""Channels that leave operators which mix them: the compact network equals a narrow one; the difference is measured."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from timm.layers import EcaModule, LayerNorm2d, RmsNorm2d, ScaledStdConv2d, StdConv2d
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from fastprune.networks.masked import MaskedNetwork
from fastprune.surgery import Cut, cut

WIDTH = 8  # no other dimension of the networks has this size
KEEP = [0, 2, 3, 7]

Between = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions with something between them that may have parameters."""

    def __init__(self, width: int, make: Callable[[int], nn.Module], between: Between, conv: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, width, 3, padding=1), make(width)
        self.second, self.between = conv(width, 5, 3), between
        self.last = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(self.between(self.inner, torch.relu(self.first(x)))))
        return self.last(x.mean((2, 3)))


class Standardised(nn.Conv2d):
    """Weight standardisation by hand."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class FromVariance(nn.Conv2d):
    """Weight standardisation by one operator for both statistics, on a flattened weight."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        variance, mean = torch.var_mean(flat, 1, keepdim=True)
        return F.conv2d(x, ((flat - mean) * torch.rsqrt(variance + 1e-5)).view_as(self.weight), self.bias)


def weight_norm_conv(width: int, out: int, kernel: int) -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(width, out, kernel))


def through(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def at_the_end(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def nothing(width: int) -> nn.Module:
    return nn.Identity()


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Between, object, str]] = {
    "layer norm": (nn.LayerNorm, at_the_end, nn.Conv2d, "layer_norm in inner"),
    "layer norm without weights": (
        lambda n: nn.LayerNorm(n, elementwise_affine=False), at_the_end, nn.Conv2d, "layer_norm in inner",
    ),
    "layer norm of channels and rows": (
        lambda n: nn.LayerNorm([n, 10]), lambda m, x: m(x.transpose(1, 2)).transpose(1, 2), nn.Conv2d,
        "layer_norm in inner",
    ),
    "layer norm 2d": (LayerNorm2d, through, nn.Conv2d, "layer_norm in inner"),
    "rms norm": (nn.RMSNorm, at_the_end, nn.Conv2d, "rms_norm in inner"),
    "rms norm 2d": (RmsNorm2d, through, nn.Conv2d, "mean in inner"),
    "one group": (lambda n: nn.GroupNorm(1, n), through, nn.Conv2d, "group_norm in inner"),
    "response norm": (lambda n: GlobalResponseNorm(n, channels_last=False), through, nn.Conv2d, "mean in inner"),
    "channel attention": (lambda n: EcaModule(kernel_size=3), through, nn.Conv2d, "conv1d in inner.conv"),
    "softmax": (nothing, lambda m, x: x.softmax(1) * x, nn.Conv2d, "softmax in the model"),
    "mean and std": (
        nothing, lambda m, x: (x - x.mean(1, keepdim=True)) / (1 + x.std(1, keepdim=True)), nn.Conv2d,
        "mean in the model",
    ),
    "largest": (nothing, lambda m, x: x / (1 + x.amax(1, keepdim=True)), nn.Conv2d, "amax in the model"),
    "unit length": (nothing, lambda m, x: F.normalize(x, dim=1), nn.Conv2d, "linalg_vector_norm in the model"),
    "standardised": (nothing, through, Standardised, "mean in second"),
    "standardised from variance": (nothing, through, FromVariance, "var_mean in second"),
    "StdConv2d": (nothing, through, StdConv2d, "batch_norm in second"),
    "ScaledStdConv2d": (nothing, through, ScaledStdConv2d, "batch_norm in second"),
    "weight norm": (nothing, through, weight_norm_conv, "_weight_norm in second.parametrizations.weight.0"),
}  # fmt: skip


def network(name: str, width: int = WIDTH) -> nn.Module:
    make, between, conv, _ = NETWORKS[name]
    net = Net(width, make, between, conv).double().eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net


def build_narrow(name: str, full: nn.Module) -> nn.Module:
    """Build the network narrow, with the weights of the kept channels."""
    small = network(name, len(KEEP))
    if hasattr(full.second, "scale"):
        small.second.scale = full.second.scale  # follows from the fan-in, and is no tensor
    with torch.no_grad():
        for mine, theirs in zip(small.parameters(), full.parameters(), strict=True):
            for dim, size in enumerate(theirs.shape):
                if size == WIDTH:
                    theirs = theirs.index_select(dim, torch.tensor(KEEP))
            mine.copy_(theirs)
    return small


IMAGE = torch.zeros(1, 3, 10, 10, dtype=torch.float64)


def make_plan(model: nn.Module) -> tuple[fp.ChannelGraph, fp.PruningPlan]:
    """Return a plan that keeps the channels ``KEEP`` of the first layer, and all channels of the other layers."""
    graph = fp.trace(model, IMAGE, exact=False)
    mask = torch.ones(graph.num_units)
    mask[graph.layers[0].out_units] = 0
    mask[graph.layers[0].out_units[KEEP]] = 1
    return graph, graph.plan(mask)


def close_channels(full: nn.Module) -> nn.Module:
    """Return the full network; its second convolution reads zeros in place of the channels that go."""
    hidden = copy.deepcopy(full)
    kept = torch.zeros(WIDTH, 1, 1, dtype=torch.float64)
    kept[KEEP] = 1
    hidden.second.register_forward_pre_hook(lambda module, args: (args[0] * kept,))
    return hidden


def outputs(model: nn.Module, plan: fp.PruningPlan) -> Tensor:
    with torch.no_grad():
        return plan.example(model).run(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_compact_network_is_the_narrow_one(name: str) -> None:
    model = network(name)
    graph, plan = make_plan(model)
    assert NETWORKS[name][3] in graph.inexact
    assert not graph.exact
    assert not plan.exact
    done: Cut = cut(plan, model, graph.traced)
    expected = outputs(build_narrow(name, model), plan)
    assert torch.allclose(outputs(done.model, plan), expected, rtol=1e-12, atol=1e-12)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plan.example(model).run(done.model)
    batch = plan.inputs[0].shape[0]
    assert counter.get_total_flops() // 2 == plan.macs[1] * batch
    assert sum(p.numel() for p in done.model.parameters()) == plan.params[1] < plan.params[0]
    masked = outputs(close_channels(model), plan)
    difference = float((masked - expected).abs().max() / masked.abs().max())
    assert difference > 1e-3
    assert done.difference == pytest.approx(difference, rel=1e-6)
    assert fp.verify(plan, model, done.model) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_by_default_these_channels_stay(name: str) -> None:
    graph = fp.trace(network(name), IMAGE)
    assert graph.exact
    assert graph.inexact == ()
    assert "first" not in [group.name for group in graph.groups]
    assert "first" in dict(graph.unprunable)


@pytest.mark.parametrize("name", ["layer norm", "ScaledStdConv2d", "channel attention"])
def test_gates_close_a_layers_input_and_do_not_change_the_statistics(name: str) -> None:
    model = network(name)
    graph, plan = make_plan(model)
    gated = MaskedNetwork(graph, model)
    images = plan.example(model)
    with torch.no_grad():
        result = gated(*images.tensors, plan.mask.double())
    assert torch.allclose(result, outputs(close_channels(model), plan), rtol=1e-12)
    assert torch.allclose(result, outputs(fp.masked(model, plan), plan), rtol=1e-12)


def test_a_layer_norm_without_weights_runs_the_rewritten_graph() -> None:
    model = network("layer norm without weights")
    assert isinstance(fp.apply(make_plan(model)[1], model), fp.RewrittenNetwork)
    own = fp.trace(model, IMAGE, exact=False, rewrite=False)
    assert "the code of inner (needs all channels)" in dict(own.unprunable).values()
    assert type(fp.apply(own.plan(torch.arange(own.num_units) % 2 == 0), model)) is type(model)


@pytest.mark.parametrize("name", ["layer norm", "ScaledStdConv2d", "channel attention", "layer norm without weights"])
def test_a_compact_network_trains(name: str) -> None:
    model = network(name)
    compact = fp.apply(make_plan(model)[1], model).train()
    optimizer = torch.optim.SGD(compact.parameters(), lr=1e-4)
    images = torch.randn(4, 3, 10, 10, dtype=torch.float64)
    losses = []
    for _ in range(3):
        loss = compact(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in compact.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]


def test_a_plan_says_whether_it_is_exact_in_json_too() -> None:
    model = network("ScaledStdConv2d")
    plan = make_plan(model)[1]
    values = plan.to_json()
    assert values["exact"] is False
    again = fp.PruningPlan.from_json(values)
    assert not again.exact
    assert again.to_json() == values
    assert torch.equal(outputs(fp.masked(model, again), plan), outputs(fp.masked(model, plan), plan))
    del values["exact"]
    assert fp.PruningPlan.from_json(values).exact
    with pytest.raises(fp.PlanError, match="exact must be true or false, got 1"):
        fp.PruningPlan.from_json(values | {"exact": 1})


class Mixed(nn.Module):
    """A residual stream that a layer norm reads, and channels inside a block, which it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), LayerNorm2d(8)
        self.expand, self.project = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(torch.relu(self.expand(self.norm(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("code", ["own", "rewritten"])
def test_a_plan_that_removes_no_mixed_channel_must_be_exact(code: str) -> None:
    model = Mixed().double().eval()
    graph = fp.trace(model, IMAGE, exact=False)
    assert {group.name: group.exact for group in graph.groups} == {"stem": False, "expand": True}
    assert graph.inexact_units.tolist() == [True] * 8 + [False] * 12
    mask = torch.ones(graph.num_units)
    mask[8:14] = 0
    plan = dataclasses.replace(graph.plan(mask), code=code)
    assert plan.exact
    done = cut(plan, model)
    assert done.difference < 1e-12
    with torch.no_grad():
        done.model.norm.weight.mul_(1.001)
    with pytest.raises(fp.SurgeryError, match="cannot be applied exactly"):
        fp.verify(plan, model, done.model)
    mask[0] = 0
    assert not graph.plan(mask).exact
    with pytest.raises(fp.PlanError, match="that the plan removes cannot leave: layer_norm in norm"):
        fp.apply(dataclasses.replace(graph.plan(mask), exact=True, code="rewritten"), model)


def test_the_rewritten_graph_replaces_code_that_would_cut_elsewhere() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            return self.second(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).mean((2, 3))

    model = Shuffled().double().eval()
    graph = fp.trace(model, IMAGE, exact=False)
    mask = torch.ones(8)
    mask[graph.layers[0].out_units[[1, 2]]] = 0  # the code would shuffle the six that are left
    plan = graph.plan(mask)
    compact = fp.apply(plan, model)
    assert isinstance(compact, fp.RewrittenNetwork)
    order = torch.arange(8).view(2, 4).T.flatten()  # the channel at each place after the shuffle
    places = torch.tensor([place for place, channel in enumerate(order.tolist()) if channel not in (1, 2)])
    images = plan.example(model).tensors[0]
    with torch.no_grad():
        x = model.first(images)[:, order[places]].permute(0, 2, 3, 1)
        x = F.layer_norm(x, [6], model.norm.weight[places], model.norm.bias[places]).permute(0, 3, 1, 2)
        expected = F.conv2d(x, model.second.weight[:, places], model.second.bias).mean((2, 3))
        assert torch.allclose(compact(images), expected, rtol=1e-12)


def test_values_that_are_not_finite_are_refused() -> None:
    model = network("layer norm")
    with torch.no_grad():
        model.last.bias[0] = torch.nan
    with pytest.raises(fp.SurgeryError, match="not finite"):
        fp.apply(make_plan(model)[1], model)


def test_groups_that_are_normalised_together_leave_as_a_whole_and_exactly() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 5, 1)).double().eval()
    graph = fp.trace(model, IMAGE, exact=False)
    assert graph.num_units == 4
    assert graph.exact
    assert cut(graph.plan(torch.tensor([1, 0, 0, 1])), model).difference < 1e-12


@pytest.mark.parametrize("conv", [StdConv2d, ScaledStdConv2d])
def test_standardised_depthwise_and_grouped_convolutions(conv: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), conv(8, 8, 3, groups=8), nn.ReLU(), conv(8, 12, 3, groups=2), nn.Conv2d(12, 5, 1)
    )
    model = model.double().eval()
    graph = fp.trace(model, IMAGE, exact=False)
    # A depthwise filter is standardised by itself, a grouped one over the channels that it reads.
    assert [(group.size, group.exact) for group in graph.groups] == [(4, False), (6, True)]
    mask = torch.ones(10)
    mask[5:8] = 0
    assert cut(graph.plan(mask), model).difference < 1e-12
    mask[1] = 0
    plan = graph.plan(mask)
    done = cut(plan, model)
    assert done.difference > 1e-3
    assert sum(p.numel() for p in done.model.parameters()) == plan.params[1]
    kept, out = torch.tensor([0, 2, 3]), plan.mask[4:].repeat(2)
    with torch.no_grad():
        weight = done.model[4].weight
        assert torch.equal(weight, model[4].weight[out][:, kept])


class Pair(nn.Module):
    """Two convolutions whose weights its own code standardises."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor, kept: dict[str, Tensor]) -> Tensor:
        x = torch.relu(F.conv2d(x * kept["one"] if kept else x, self.standard(self.one)))
        return F.conv2d(weight=self.standard(self.two), input=x * kept["two"] if kept else x)

    def standard(self, weight: Tensor) -> Tensor:
        return (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)


class AroundPair(nn.Module):
    """A ``Pair`` between two layers; ``kept`` masks the channels that its convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair, self.last = nn.Conv2d(3, 8, 1), Pair(), nn.Linear(8, 4)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.pair(torch.relu(self.first(x)), self.kept)).mean((2, 3)))


@pytest.mark.parametrize("weights", [["one"], ["two"], ["one", "two"]])
def test_a_block_with_two_computed_weights_closes_the_inputs_of_each(weights: list[str]) -> None:
    torch.manual_seed(0)
    model = AroundPair().double().eval()
    graph = fp.trace(model, IMAGE, exact=False)
    read = {s.tensor: s.units for s in graph.slices if s.computed and s.role == "in"}
    assert set(read) == {"pair.one", "pair.two"}
    mask, expected = torch.ones(graph.num_units), copy.deepcopy(model)
    expected.kept = {name: torch.ones(8, 1, 1, dtype=torch.float64) for name in ("one", "two")}
    for name in weights:
        mask[read[f"pair.{name}"][2:5]] = 0
        expected.kept[name][2:5] = 0
    plan = graph.plan(mask)
    done, reference = cut(plan, model), fp.masked(model, plan)
    closed, compact = outputs(expected, plan), outputs(done.model, plan)
    difference = float((closed - compact).abs().max() / closed.abs().max())
    assert difference > 1e-3
    assert done.difference == pytest.approx(difference, rel=1e-6)
    for network in (reference, copy.deepcopy(reference)):
        assert torch.allclose(outputs(network, plan), closed, rtol=1e-12)
    with pytest.raises(RuntimeError):
        reference(plan.example(model).tensors[0][:, :1])
    assert torch.allclose(outputs(expected, plan), closed, rtol=1e-12)  # the failed run left nothing behind
    assert torch.allclose(outputs(reference, plan), closed, rtol=1e-12)


def test_a_layer_that_cannot_be_found_is_refused() -> None:
    torch.manual_seed(0)
    model = AroundPair().double().eval()
    graph = fp.trace(model, IMAGE, exact=False)
    mask = torch.ones(graph.num_units)
    mask[graph.layers[0].out_units[0]] = 0
    model.pair.forward = MethodType(lambda pair, x, kept: x * pair.standard(pair.one).mean(), model.pair)
    with pytest.raises(fp.SurgeryError, match=r"'pair.one': the layer .* could not be found"):
        outputs(fp.masked(model, graph.plan(mask)), graph.plan(mask))


def test_a_computed_weight_that_other_code_reads_stays() -> None:
    class Regularised(Standardised):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight) * weight.square().sum((1, 2, 3))[:, None, None]

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Regularised(8, 5, 1), nn.Conv2d(5, 4, 1))
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8), exact=False)
    assert graph.groups == ()


def test_cumulative_sums_keep_their_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Cumulative(), nn.Conv2d(8, 5, 1))
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8), exact=False)
    assert graph.groups == ()
    assert dict(graph.unprunable)["0"] == "cumsum in 1"


class Cumulative(nn.Module):
    """A sum over the channels so far, which is no statistic of all."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)
