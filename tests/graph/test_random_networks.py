"""Random networks of all constructs that couple channels: every random plan is exact and has the predicted cost."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from fastprune.networks.masked import MaskedNetwork

BLOCKS: dict[str, type[Block]] = {}


@dataclass(frozen=True)
class Extent:
    """Channels and pixels (a square's side) between two blocks."""

    width: int
    side: int


class Block(nn.Module):
    """A part of a network, built for the extent of its input; ``after`` is the extent of its output."""

    after: Extent

    def __init_subclass__(cls) -> None:
        BLOCKS[cls.__name__] = cls

    def __init__(self, before: Extent, rng: random.Random) -> None:
        super().__init__()
        self.after = before
        self.build(before.width, before.side, rng)

    def build(self, width: int, side: int, rng: random.Random) -> None:
        raise NotImplementedError


def activation(width: int, rng: random.Random) -> nn.Module:
    return rng.choice(
        [nn.ReLU(), nn.ReLU(inplace=True), nn.PReLU(), nn.PReLU(width), nn.GELU(), nn.Hardswish(inplace=True),
         nn.LeakyReLU(0.1, inplace=True), nn.Identity()]
    )  # fmt: skip


def norm(width: int, rng: random.Random) -> nn.Module:
    return rng.choice(
        [nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.BatchNorm2d(width, affine=False), nn.Identity(),
         nn.BatchNorm2d(width, track_running_stats=False), nn.InstanceNorm2d(width, affine=True)]
    )  # fmt: skip


def conv(width: int, out: int, kernel: int, rng: random.Random, **options: int) -> nn.Sequential:
    """Convolution, norm, activation; the size stays unless a stride is among the options."""
    dilation = options.setdefault("dilation", 1)
    mode = rng.choice(["zeros", "zeros", "reflect"])
    first = nn.Conv2d(
        width, out, kernel, padding=dilation * (kernel // 2), bias=rng.random() < 0.5, padding_mode=mode, **options
    )
    return nn.Sequential(first, norm(out, rng), activation(out, rng))


class Plain(Block):
    def build(self, width: int, side: int, rng: random.Random) -> None:
        out = rng.choice([4, 6, 8])
        stride = rng.choice([1, 2]) if side >= 8 else 1
        groups = rng.choice([g for g in (1, 1, 2, 3, 4) if width % g == 0 and out % g == 0])
        self.layers = conv(width, out, 3, rng, stride=stride, dilation=rng.choice([1, 2]) if side > 2 else 1,
                           groups=groups)  # fmt: skip
        self.after = Extent(out, -(-side // stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Depthwise(Block):
    def build(self, width: int, side: int, rng: random.Random) -> None:
        multiplier = rng.choice([1, 1, 2])
        self.layers = conv(width, width * multiplier, 3, rng, groups=width)
        self.project = nn.Conv2d(width * multiplier, 6, 1)
        self.after = Extent(6, side)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.layers(x))


class Transposed(Block):
    def build(self, width: int, side: int, rng: random.Random) -> None:
        stride = 2 if side <= 4 else 1
        self.layer = nn.ConvTranspose2d(width, 6, stride, stride=stride, bias=rng.random() < 0.5)
        self.after = Extent(6, side * stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Residual(Block):
    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.first, self.second = conv(width, 5, 3, rng), conv(5, width, 1, rng)
        self.in_place = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if self.in_place:
            y += x
            return y.relu_()
        return x + y


class Twice(Block):
    """A layer, its norm and its activation, which run twice."""

    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.layers = conv(width, width, 3, rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.tanh(self.layers(x)))


class Tied(Block):
    """Two depthwise layers that share their weight."""

    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))
        self.second.weight = self.first.weight
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.relu(self.first(x))))


class Branches(Block):
    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.branches = nn.ModuleList(
            [conv(width, 3, 1, rng), nn.Sequential(conv(width, 4, 1, rng), conv(4, 2, 3, rng)),
             nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)]
        )  # fmt: skip
        self.order = rng.sample(range(4), 3)
        self.project = conv(sum((3, 2, width, width)[i] for i in self.order), 6, 1, rng)
        self.after = Extent(6, side)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([self.branches[i](x) for i in self.order], 1))


class Shuffle(Block):
    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.groups = rng.choice([2, 4])
        self.first, self.second = conv(width, 8, 1, rng), conv(8, 8, 3, rng, groups=self.groups)
        self.after = Extent(8, side)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        return self.second(x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w))


class Halves(Block):
    """Halves that are multiplied, joined again, or go separate ways; or a part that is overwritten."""

    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.first = conv(width, 8, 1, rng)
        self.use = rng.choice(["multiply", "join", "apart", "in place"])
        self.left = conv(4, 4, 3, rng)
        self.right = conv(4, 4, 1, rng)
        self.last = nn.Conv2d(8 if self.use in ("join", "in place") else 4, 4, 1)
        self.after = Extent(4, side)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        a, b = x.chunk(2, 1) if self.use != "apart" else torch.split(x, x.shape[1] // 2, 1)
        if self.use == "multiply":
            return self.last(a * torch.sigmoid(b))
        if self.use == "in place":
            x[:, :, 1:].mul_(0.5)
            return self.last(x)
        a, b = self.left(a), self.right(b)
        return self.last(torch.cat([a, b], 1) if self.use == "join" else a + b)


class SqueezeExcite(Block):
    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.first = conv(width, 6, 1, rng)
        self.linear = rng.random() < 0.5
        layer: Callable[..., nn.Module] = nn.Linear if self.linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.squeeze, self.excite = layer(6, 3), layer(3, 6)
        self.last = nn.Conv2d(6, 5, 1)
        self.after = Extent(5, side)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gate = x.mean((2, 3), keepdim=not self.linear)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(gate))))
        return self.last(x * (gate[:, :, None, None] if self.linear else gate))


class LayerScale(Block):
    """A parameter, a buffer that no state holds, and a number per channel."""

    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.layers = conv(width, width, 3, rng)
        self.scale = nn.Parameter(torch.rand(width, 1, 1))
        self.register_buffer("shift", torch.rand(1, width, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.layers(x) + 0.5 * self.shift


class Pixels(Block):
    """Pixels that become channels, or channels that become pixels."""

    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.first = conv(width, 8, 1, rng)
        self.move = nn.PixelShuffle(2) if side <= 4 else nn.PixelUnshuffle(2)
        self.after = Extent(2, side * 2) if side <= 4 else Extent(32, side // 2)
        self.last = nn.Conv2d(self.after.width, 5, 1)
        self.after = Extent(5, self.after.side)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.move(self.first(x)))


class PadChannels(Block):
    """The shortcut of CIFAR's ResNets: fewer pixels, and channels of zeros before and behind."""

    def build(self, width: int, side: int, rng: random.Random) -> None:
        stride = 2 if side > 2 else 1
        self.stride = stride
        self.layers = conv(width, width + 3, 3, rng, stride=stride)
        self.after = Extent(width + 3, -(-side // stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 1, 2))


class Slices(Block):
    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.first = conv(width, 6, 1, rng)
        self.few, self.many = nn.Conv2d(2, 4, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.after = Extent(4, side)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.few(x[:, 1:3]) + self.many(F.pad(x[:, :, 1:], (0, 0, 1, 0)))


class Mixing(Block):
    """An operator that reads several channels at once, so that they stay."""

    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.first, self.last = conv(width, 6, 1, rng), conv(6, 6, 1, rng)
        self.norm = rng.choice([nn.GroupNorm(2, 6), nn.Softmax(1), nn.LayerNorm(6), nn.Softmax(-1)])
        self.after = Extent(6, side)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if isinstance(self.norm, nn.LayerNorm):
            return self.last(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.last(self.norm(x))


class Tokens(Block):
    """Linear layers on the last dimension, with a softmax over pixels between them."""

    def build(self, width: int, side: int, rng: random.Random) -> None:
        self.first, self.last = nn.Linear(width, 7), nn.Linear(7, 5)
        self.after = Extent(5, side)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.first(x.flatten(2).transpose(1, 2)).softmax(1)
        return self.last(y * 3 + x.new_ones(1)).transpose(1, 2).reshape(n, -1, h, w)


class Network(nn.Module):
    """Blocks, a classifier, and optionally the features before it as a second output."""

    def __init__(self, names: list[str], seed: int, outputs: str) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.stem = conv(3, 6, 3, rng)
        extent = Extent(6, 8)
        self.blocks = nn.ModuleList()
        for name in names:
            block = BLOCKS[name](extent, rng)
            self.blocks.append(block)
            extent = block.after
        self.flat = rng.random() < 0.5
        self.head = nn.Linear(extent.width * (extent.side**2 if self.flat else 1), 3)
        self.outputs = outputs
        generator = torch.Generator().manual_seed(seed)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():  # different values, so that a wrong index is noticed
                tensor.data.uniform_(0.2, 1.0, generator=generator)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                spread = (2 / parameter[0].numel()) ** 0.5
                parameter.data.normal_(0, spread, generator=generator)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        x = self.stem(x)
        middle = x
        for block in self.blocks:
            middle, x = x, block(x)
        y = self.head(x.flatten(1) if self.flat else x.mean((2, 3)))
        return {"one": y, "tuple": (y, middle.mean((2, 3))), "dict": {"y": y, "x": x}}[self.outputs]


def masks(graph: fp.ChannelGraph, seed: int) -> list[Tensor]:
    """Return two masks: half of the units at random, and a single unit of each group."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.rand(graph.num_units, generator=generator) < 0.5
    single = torch.zeros(graph.num_units, dtype=torch.bool)
    for group in graph.groups:
        stays = group.start + int(torch.randint(group.size, (), generator=generator))
        half[stays] = single[stays] = True
    return [half, single]


def leaves(output: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output.values() if isinstance(output, dict) else output)


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    assert [x.shape for x in got] == [x.shape for x in expected]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


@pytest.mark.slow
@settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes; the blocks have tests of their own
    suppress_health_check=list(HealthCheck),
)
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    outputs=st.sampled_from(["one", "one", "tuple", "dict"]),
    batch=st.integers(1, 3),
    rewrite=st.booleans(),
)
def test_every_plan_for_a_random_network_is_exact(
    names: list[str], seed: int, outputs: str, batch: int, rewrite: bool
) -> None:
    check(Network(names, seed, outputs), seed, batch, rewrite=rewrite)


@pytest.mark.parametrize("rewrite", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_plan_for_each_block_is_exact(name: str, rewrite: bool) -> None:
    check(Network([name], 1, "one"), 1, 1, rewrite=rewrite)


def check(network: nn.Module, seed: int, batch: int, *, rewrite: bool) -> None:
    """Trace, plan, save, load, apply, verify, count, and compare with the masked network."""
    model = network.double()
    before = copy.deepcopy(model.state_dict())
    example = torch.zeros(batch, 3, 8, 8, dtype=torch.float64)
    graph = fp.trace(model, example, rewrite=rewrite)
    gates = MaskedNetwork(graph, model)
    images = torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    full = torch.ones(graph.num_units, dtype=torch.bool)
    model.eval()
    with torch.no_grad():
        whole = leaves(model(images))
        assert relative_error(leaves(gates(images, full.double())), whole) < 1e-12
        assert relative_error(leaves(fp.apply(graph.plan(full), model)(images)), whole) == 0
    for mask in masks(graph, seed):
        plan = fp.PruningPlan.from_json(graph.plan(mask).to_json())
        assert torch.equal(plan.mask, mask)
        compact = fp.apply(plan, model)
        assert rewrite or type(compact) is type(model)
        assert fp.verify(plan, model, compact, dtype=torch.float64) <= 1e-9
        cost = fp.trace(compact, example).cost()
        assert (int(cost.macs), int(cost.params)) == (plan.macs[1], plan.params[1])
        assert plan.params[1] == sum(p.numel() for p in compact.parameters())
        with torch.no_grad():
            assert relative_error(leaves(gates(images, mask.double())), leaves(compact(images))) < 1e-9
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Between(nn.Module):
    """Two convolutions with some code between them."""

    def __init__(self, between: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.pairs = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.logits = nn.Parameter(torch.rand(3, generator=generator))
        self.map = nn.Parameter(torch.rand(1, 8, 4, 4, generator=generator))
        self.constant = torch.rand(8, 1, 1, generator=generator, dtype=torch.float64)  # no buffer: it cannot shrink
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.between(self, self.first(x))))


def overwrite_view(net: Between, x: Tensor) -> Tensor:
    x.flatten(2).relu_()
    return x


def overwrite_viewed(net: Between, x: Tensor) -> Tensor:
    view = x.flatten(2)
    x.mul_(x)
    return view.view(x.shape)


def overwrite_after_reading(net: Between, x: Tensor) -> Tensor:
    y = net.middle(x)
    x.exp_()
    return x.tanh() + y


def without_gradient(net: Between, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.middle(x)


@pytest.mark.parametrize(
    ("between", "units"),
    [
        (overwrite_view, 8),
        (overwrite_viewed, 8),
        (overwrite_after_reading, 8),
        (without_gradient, 16),
        (lambda net, x: net.up(x), 8),
        (lambda net, x: net.pairs(x), 4),
        (lambda net, x: net.normed(x), 0),
        (lambda net, x: x * net.logits.softmax(0)[0], 8),
        (lambda net, x: x + F.interpolate(net.map, size=(8, 8)), 0),
        (lambda net, x: x + net.middle(F.interpolate(net.map, size=(8, 8))), 8),
        (lambda net, x: F.avg_pool2d(x, 2) + net.map, 8),
        (lambda net, x: x * net.constant, 0),
        (lambda net, x: x * (x[:, :1] > 0).type_as(x.flatten(1)), (0, 7)),
        (lambda net, x: x + net.middle(x[0]), 0),
        (lambda net, x: F.max_pool2d(x.flatten(2), 3, 1, 1).view(x.shape), 0),
        (lambda net, x: F.conv_transpose2d(torch.relu(net.middle(x)), net.middle.weight, padding=1), 0),
        (lambda net, x: torch.channel_shuffle(x, 2), (0, 8)),
        (lambda net, x: torch.frexp(x)[0], 0),
    ],
    ids=[
        "view overwritten", "viewed overwritten", "overwritten after reading", "region without gradient",
        "depthwise transposed", "grouped transposed", "weight norm", "softmax of a parameter", "map", "convolved map",
        "offsets",
        "constant", "type_as", "without batch", "pool without batch", "tied to its transpose", "channel shuffle",
        "several results",
    ],
)  # fmt: skip
@pytest.mark.parametrize("rewrite", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_unusual_code_is_exact_or_kept(
    between: Callable[[Between, Tensor], Tensor], units: int | tuple[int, int], rewrite: bool
) -> None:
    model = Between(between)
    own, rewritten = units if isinstance(units, tuple) else (units, units)
    check(model, 0, 1, rewrite=rewrite)
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64), rewrite=rewrite)
    assert graph.num_units == (rewritten if rewrite else own)


@pytest.mark.parametrize("between", [lambda net, x: net.normed(x), lambda net, x: net.pairs(x)])
def test_a_layer_that_is_kept_is_counted(between: Callable[[Between, Tensor], Tensor]) -> None:
    model, images = Between(between).eval(), torch.zeros(1, 3, 8, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert int(fp.trace(model, images).cost().macs) * 2 == counter.get_total_flops()


def test_classes_are_compared_as_well() -> None:
    class Classes(Between):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    model = Classes(lambda net, x: x)
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8))
    plan = graph.plan(masks(graph, 0)[0])
    compact = fp.apply(plan, model)
    with torch.no_grad():
        compact.last.bias.copy_(compact.last.bias.roll(1))
    with pytest.raises(fp.SurgeryError, match="differ by inf"):
        fp.verify(plan, model, compact)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.to("meta"), "Between is on the meta device"),
        (lambda model: setattr(model.up, "lines", (n for n in range(3))), "Between cannot be copied"),
        (
            lambda model: model.last.register_forward_pre_hook(lambda _, x: 1 // 0),
            "does not run in torch.float32: 'Between' fails with integer",
        ),
    ],
)
def test_a_model_that_cannot_be_verified_is_refused(spoil: Callable[[Between], object], message: str) -> None:
    model = Between(lambda net, x: x)
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8))
    spoil(model)
    with pytest.raises(fp.SurgeryError, match=message):
        fp.apply(graph.plan(torch.ones(graph.num_units)), model)


def test_a_train_only_branch_that_cannot_be_traced_is_reported() -> None:
    class Branching(Between):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and float(x.sum()) > 0:
                x = x * self.logits[0]
            return super().forward(x)

    with pytest.warns(UserWarning, match="not reached in eval mode, and train mode cannot be traced"):
        fp.trace(Branching(lambda net, x: x), torch.zeros(1, 3, 8, 8))
