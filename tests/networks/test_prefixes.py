"""Sub-networks of frozen weights on our own kernels: the same features, from weights that are packed once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastprune as fp
from fastprune.graph import ChannelGraph
from fastprune.graph.interior import gated_units
from fastprune.networks import prefixes
from fastprune.networks.subnetworks import SubNetworks
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.packed import best_instructions, convolve_prefix, pack

needs_kernels = pytest.mark.skipif(best_instructions() is None, reason="the kernels are written for AVX2 and AVX-512")


def prepare(name: str) -> tuple[nn.Module, ChannelGraph, SubNetworks, Tensor]:
    torch.manual_seed(0)
    model = fp.models.create(name)
    images = torch.randn(4, 3, 48, 48)
    graph = fp.trace(model, images)
    return model, graph, SubNetworks(graph, model), images


def first_units(graph: ChannelGraph, ratio: float) -> Tensor:
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    for group in graph.groups:
        mask[group.start + max(1, int(ratio * group.size)) : group.start + group.size] = False
    return mask


def record_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Return a list that grows with each call of a function that the module imports."""
    function, calls = getattr(prefixes, name), []

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(prefixes, name, call)
    return calls


def near(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm()) <= 2e-5 * float(wanted.norm())


@needs_kernels
@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        pytest.param("torchvision:resnet50", marks=pytest.mark.slow),
        pytest.param("torchvision:mobilenet_v2", marks=pytest.mark.slow),
        pytest.param("torchvision:mobilenet_v3_small", marks=pytest.mark.slow),
        pytest.param("torchvision:densenet121", marks=pytest.mark.slow),
        pytest.param("torchvision:shufflenet_v2_x1_0", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_outputs_are_as_exact_as_the_librarys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, networks, images = prepare(name)
    exact = SubNetworks(graph, copy.deepcopy(model).double())
    frozen, calls = networks.freeze(), record_calls(monkeypatch, "convolve_prefix")
    convolutions = [module for module in networks.model.modules() if isinstance(module, nn.Conv2d)]
    ours = sum(conv.groups in (1, conv.in_channels) for conv in convolutions)
    for ratio in (0.0, 0.3, 0.55, 1.0):
        mask = first_units(graph, ratio)
        wanted = exact(images.double(), mask=mask)
        # Statistics of few numbers amplify rounding.
        errors = [float((each(images, mask=mask) - wanted).norm() / wanted.norm()) for each in (frozen, networks)]
        assert errors[0] <= 3 * errors[1] + 1e-7
    assert len(calls) == 4 * ours


@needs_kernels
@torch.no_grad()
def test_each_weight_is_packed_once_for_all_widths_of_an_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, networks, images = prepare("resnet20")
    frozen, calls = networks.freeze(), record_calls(monkeypatch, "pack")
    for ratio in (0.3, 0.55, 1.0, 0.3, 0.55, 1.0):
        frozen(images, mask=first_units(graph, ratio) | ~gated_units(graph, "interior"))
    both = 6  # convolutions that read 16 or 32 channels inside of a block: by Winograd's algorithm and directly
    assert len(calls) == sum(isinstance(module, nn.Conv2d) for module in model.modules()) + both


@needs_kernels
@torch.no_grad()
def test_other_channels_than_the_first_are_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph, networks, images = prepare("resnet20")
    frozen, mask = networks.freeze(), ~first_units(graph, 0.5)
    assert near(frozen(images, mask=mask), networks(images, mask=mask))
    calls = record_calls(monkeypatch, "pack")
    frozen(images, mask=mask)
    assert len(calls) >= 18


@needs_kernels
@torch.no_grad()
def test_changed_weights_are_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, networks, images = prepare("resnet20")
    frozen, mask = networks.freeze(), first_units(graph, 0.5) | ~gated_units(graph, "interior")
    before, calls = frozen(images, mask=mask), record_calls(monkeypatch, "pack")
    model.layer2[1].conv1.weight.mul_(torch.rand(32, 1, 1, 1) - 0.5)
    found = frozen(images, mask=mask)
    assert not near(found, before)
    assert near(found, networks(images, mask=mask))
    assert len(calls) == 1


def test_gradients_and_autocast_are_the_librarys() -> None:
    model, graph, networks, images = prepare("resnet20")
    frozen, mask = networks.freeze(), first_units(graph, 0.5)
    gradients = []
    for each in (networks, frozen):
        model.zero_grad()
        each(images, mask=mask).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frozen(images, mask=mask), networks(images, mask=mask))


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.Tanh()])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_follows_a_batch_norm(activation: nn.Module, adds: bool, dtype: torch.dtype) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.norm, self.last = (
                nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1),
            )  # fmt: skip
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.norm(self.conv(x))
            return self.last(self.activation(x + y if adds else y)).mean((2, 3))

    torch.manual_seed(0)
    model, images = Block().to(dtype), torch.randn(2, 3, 9, 9, dtype=dtype)
    nn.init.uniform_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    graph = fp.trace(model, images)
    networks, mask = SubNetworks(graph, model), first_units(graph, 0.6)
    wanted = fp.apply(graph.plan(mask), model).train()(images)
    assert near(networks.freeze()(images, mask=mask), wanted)


class Small(nn.Module):
    """Layers that a subclass connects."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm, self.last = (
            nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1),
        )  # fmt: skip
        self.linear = nn.Linear(8 * 6 * 6, 2)
        self.grouped = nn.Conv2d(16, 8, 3, groups=8)
        self.wide = nn.Conv2d(3, 16, 3)
        self.added = nn.Parameter(torch.randn(1, 8, 6, 6))


class Viewed(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.norm(self.conv(self.stem(x)))).view(len(x), -1))


class WithInput(Small):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm3(self.last(self.stem(x))) + x)

    def __init__(self) -> None:
        super().__init__()
        self.norm3 = nn.BatchNorm2d(3)


class WithParameter(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.conv(self.stem(x))) + self.added))


class WithSlice(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.conv(self.stem(x))) + self.wide(F.pad(x, (1, 1, 1, 1)))[:, :8]))


class Overwriting(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        n = self.norm(y)
        y[:, :4].sub_(5).mul_(-1)
        return self.last(torch.relu(n)) + self.last(y)


class TwoNorms(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.last(self.norm(y) + self.second(y))

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.BatchNorm2d(8)
        nn.init.constant_(self.second.weight, 3)


class AddsWhatIsNormalised(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.last(torch.relu(self.norm(y) + y))


class AlsoReturned(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.last(self.stem(x))
        return torch.relu(self.third(y)), y

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.BatchNorm2d(3)


class ReadThroughAView(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.last(self.norm(y)) + self.last(y.detach())


class GroupsOfTwo(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.grouped(self.wide(x))))


class OneNumber(Small):
    def forward(self, x: Tensor) -> Tensor:
        return (
            F.conv2d(x, self.last(self.stem(x))[0, :, :2, :2].expand(4, 3, 2, 2), stride=[2])
            + F.conv2d(self.stem(x), self.conv.weight[:4], stride=[2], padding=[1]).mean()
        )


class AddsASize(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.conv(self.stem(x))) + x.shape[0]))


class NormInARegion(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        with torch.no_grad():
            n = self.norm(self.stem(x))
        return self.last(torch.relu(n + y))


class SingleImage(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.stem(self.picture)) + self.conv(self.stem(x)))

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.randn(3, 6, 6))


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    [
        *(Viewed, WithInput, WithParameter, WithSlice, Overwriting, GroupsOfTwo, OneNumber, SingleImage),
        *(TwoNorms, AddsWhatIsNormalised, AlsoReturned, ReadThroughAView, AddsASize, NormInARegion),
    ],
)
def test_odd_networks(kind: type[Small]) -> None:
    torch.manual_seed(0)
    model, images = kind(), torch.randn(5, 3, 6, 6)
    graph = fp.trace(model, images)
    networks = SubNetworks(graph, model)
    for ratio in (0.0, 0.5, 1.0):
        mask = first_units(graph, ratio)
        found, wanted = (pytree.tree_leaves(each(images, mask=mask)) for each in (networks.freeze(), networks))
        assert all(near(*pair) for pair in zip(found, wanted, strict=True))


def test_a_sum_behind_a_region_without_gradients_keeps_its_own() -> None:
    torch.manual_seed(0)
    model, images = NormInARegion(), torch.randn(5, 3, 6, 6)
    graph = fp.trace(model, images)
    networks, gradients = SubNetworks(graph, model), []
    for each in (networks, networks.freeze()):
        model.zero_grad()
        each(images, mask=first_units(graph, 0.5)).square().sum().backward()
        assert model.conv.weight.grad is not None
        gradients.append(model.conv.weight.grad.clone())
    assert torch.equal(*gradients)


@torch.no_grad()
def test_a_single_value_becomes_the_bias() -> None:
    class Squeezed(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.norm(self.stem(x).mean((2, 3), keepdim=True))))

    model = Squeezed()
    nn.init.normal_(model.norm.bias)
    graph = fp.trace(model, torch.randn(2, 3, 6, 6))
    networks, mask = SubNetworks(graph, model), first_units(graph, 0.5)
    image = torch.randn(1, 3, 6, 6)
    assert near(networks.freeze()(image, mask=mask), networks(image, mask=mask))


def test_weights_without_a_version_are_packed_in_each_call() -> None:
    with torch.inference_mode():
        model, images = Viewed(), torch.randn(2, 3, 6, 6)
        graph = fp.trace(model, images)
        networks, mask = SubNetworks(graph, model), first_units(graph, 0.5)
        frozen = networks.freeze()
        frozen(images, mask=mask)
        model.conv.weight.mul_(torch.rand(8, 1, 1, 1) - 0.5)
        assert near(frozen(images, mask=mask), networks(images, mask=mask))


@torch.no_grad()
def test_nothing_is_left_behind_a_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, networks, images = prepare("resnet20")
    frozen, mask, calls = networks.freeze(), first_units(graph, 0.5), record_calls(monkeypatch, "batch_norm_in_place")
    frozen(images, mask=mask)
    assert len(calls) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    left = {node.target for node in frozen.rewrite_for(mask).module.graph.nodes}
    aten = torch.ops.aten
    assert not left & {aten.batch_norm.default, aten.relu.default, aten.add.Tensor, aten.conv2d.default}


@needs_kernels
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("depthwise", [False, True])
def test_prefixes_of_a_weight(kernel: int, depthwise: bool) -> None:
    torch.manual_seed(kernel)
    weight, bias = torch.randn(20, 1 if depthwise else 24, kernel, kernel), torch.randn(20)
    for stride in (1, 2):
        geometry = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2), "dilation": (1, 1)}
        packed = pack(weight, Geometry(**geometry, groups=20 if depthwise else 1))
        for rows, channels in ((1, 1), (7, 13), (20, 24)):
            x = torch.randn(2, rows if depthwise else channels, 8, 9)
            part = weight[:rows, : 1 if depthwise else channels]
            wanted = F.conv2d(x, part, bias[:rows], **geometry, groups=rows if depthwise else 1)
            found = convolve_prefix(x, packed, rows, bias[:rows])
            assert near(found, wanted)
            assert near(convolve_prefix(x, packed, rows), wanted - bias[:rows, None, None])
            assert found.shape == wanted.shape
