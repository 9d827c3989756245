"""Gates inside blocks: their places and the cost of the layers next to them."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nn

import fastprune
from fastprune import models
from fastprune.graph import ChannelGraph, trace
from fastprune.graph.interior import gated_units, interior_units, last_gated_units
from fastprune.methods.gates.gated import prunable_cost
from fastprune.planning.budget import Budget


@cache
def traced(name: str) -> tuple[nn.Module, ChannelGraph]:
    """Return a network and its graph for images of 32 pixels; nobody changes them."""
    if name.startswith("torchvision:"):
        with torch.device("meta"):  # nobody reads the weights
            model = getattr(torchvision.models, name.removeprefix("torchvision:"))(weights=None, num_classes=10)
        model = model.to_empty(device="cpu")
    else:
        model = models.create(name)
    return model, trace(model, torch.zeros(1, 3, 32, 32))


def gated_groups(graph: ChannelGraph) -> list[str]:
    inside = interior_units(graph)
    for group in graph.groups:
        assert inside[group.units].all() or not inside[group.units].any()
    return [group.name for group in graph.groups if inside[group.start]]


# Gates of Gao et al. (DMC, DDNP, SANP) and the MACs of the layers next to them, in millions at the network's own size.
PAPERS = {
    "resnet18": (8, 1676.28),
    "resnet34": (16, 3525.97),
    "resnet50": (32, 3609.46),
    "mobilenet_v2": (16, 258.55),
    "mobilenet_v3_small": (10, 45.51),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n not in ("resnet18", "resnet20", "resnet56") else []) for n in PAPERS],
)
def test_gates_of_the_papers(name):
    gates, prunable = PAPERS[name]
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    model = model.to_empty(device="cpu").eval()
    graph = trace(model, torch.zeros(1, 3, 224, 224))
    assert len(gated_groups(graph)) == gates
    assert prunable_cost(graph, Budget("flops", 0.5), interior_units(graph)) / 1e6 == pytest.approx(prunable, abs=0.005)


@pytest.mark.parametrize(
    ("name", "gates", "prunable"),
    [
        ("resnet20", 9, 40.11),
        ("resnet56", 27, 125.04),
        pytest.param("mobilenetv2-cifar", 17, 270.41, marks=pytest.mark.slow),
    ],
)
def test_gates_on_cifar_networks(name, gates, prunable):
    _, graph = traced(name)
    assert len(gated_groups(graph)) == gates
    assert prunable_cost(graph, Budget("flops", 0.5), interior_units(graph)) / 1e6 == pytest.approx(prunable, abs=0.005)


def test_a_bottleneck_has_two_gates_at_any_input_size():
    model, graph = traced("torchvision:resnet50")
    names = gated_groups(graph)  # the last stage has one pixel, like a classifier
    blocks = [
        name for name, module in model.named_modules() if isinstance(module, torchvision.models.resnet.Bottleneck)
    ]
    assert names == [f"{block}.conv{i}" for block in blocks for i in (1, 2)]


def test_one_gate_follows_the_second_convolution():
    _, graph = traced("torchvision:resnet50")
    both, one = interior_units(graph), gated_units(graph, "one_gate")
    names = [group.name for group in graph.groups if bool(one[group.start])]
    assert names == [name for name in gated_groups(graph) if name.endswith("conv2")]
    assert len(names) == 16
    assert all(one[group.units].all() or not one[group.units].any() for group in graph.groups)
    assert not (one & ~both).any()
    # Without the first gate, conv1 is not next to a gate; conv2 and conv3 are.
    first = sum(layer.macs for layer in graph.table() if layer.layer.endswith(".conv1"))
    costs = [prunable_cost(graph, Budget("flops", 0.5), units) for units in (both, one)]
    assert costs[0] - costs[1] == first


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("mobilenetv2-cifar", "no residual block of this network has two gates"),
        ("resnet20", "no residual block of this network has two gates"),
        ("torchvision:vgg11_bn", "no residual blocks"),
    ],
)
def test_one_gate_is_refused_without_blocks_of_two_gates(model, words):
    _, graph = traced(model)
    with pytest.raises(ValueError, match=words):
        last_gated_units(graph, interior_units(graph))


def test_a_plain_network_keeps_its_first_and_last_convolution():
    model, graph = traced("torchvision:vgg11_bn")
    names = gated_groups(graph)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert names == convolutions[1:-1]


def test_channels_without_an_activation_have_no_gate():
    body = [
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.ReLU(),
    ]
    model = torch.nn.Sequential(*body, torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.LazyLinear(4))
    x = torch.zeros(1, 3, 16, 16)
    model(x)
    assert gated_groups(trace(model, x)) == ["3"]


def test_parameters_of_gated_layers():
    graph = trace(models.create("resnet20"), torch.zeros(1, 3, 32, 32))
    # Two 3×3 convolutions per block, and scale and shift of the batch norm between them.
    blocks = [(16, 16)] * 3 + [(16, 32)] + [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 2
    expected = sum(9 * before * width + 9 * width * width + 2 * width for before, width in blocks)
    assert prunable_cost(graph, Budget("params", 0.5), interior_units(graph)) == expected


class ThreeConvolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 24, 24]
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths))
        self.head = torch.nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def test_auto_means_all_in_networks_without_blocks():
    plain = trace(ThreeConvolutions(), torch.zeros(1, 3, 16, 16))
    assert int(interior_units(plain).sum()) == 24
    assert bool(gated_units(plain, "auto").all())


@pytest.mark.parametrize("name", ["resnet20", pytest.param("mobilenetv2-cifar", marks=pytest.mark.slow)])
def test_auto_means_interior_in_residual_networks(name):
    graph = trace(models.create(name), torch.zeros(1, 3, 32, 32))
    assert torch.equal(gated_units(graph, "auto"), interior_units(graph))
    assert not bool(gated_units(graph, "auto").all())


@pytest.mark.parametrize("method", ["dmc", "ddnp", "dp", "sanp"])
def test_gates_of_a_plain_network_are_everywhere_and_said_aloud(method, caplog):
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
    options = {"epochs": 1, "batch_size": 8, "evaluate_every": 0} | ({} if method == "sanp" else {"samples": 16})
    with caplog.at_level("INFO", "fastprune"):
        result = fastprune.prune(
            ThreeConvolutions(), images[:1], method=method, budget="params=0.2", data=[(images, labels)], **options
        )
    assert f"{method}: groups auto = all, because this network has no residual blocks" in caplog.text
    kept = [int(result.plan.mask[group.units].sum()) for group in result.graph.groups]
    assert all(k < group.size for k, group in zip(kept, result.graph.groups, strict=True))
