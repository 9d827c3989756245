"""The shapes are those of real networks."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.bench.shapes import NETWORKS, RESNET50_GROUPS, convolutions, convolutions_of


@pytest.mark.parametrize(
    ("network", "layers", "macs", "activations"),
    [
        # Layers and MACs as published, without the linear layer's; ResNets have no activation before an addition.
        ("ResNet-50", 53, 4_089_184_256 - 2048 * 1000, {"relu": 33, "none": 20}),
        ("MobileNetV2", 52, 300_774_272 - 1280 * 1000, {"relu6": 35, "none": 17}),
        ("ResNet-56", 55, 125_485_696 - 64 * 10, {"relu": 28, "none": 27}),
    ],
)
def test_every_convolution_is_found(network: str, layers: int, macs: int, activations: dict[str, int]) -> None:
    shapes = convolutions(network)
    assert sum(shape.count for shape in shapes) == layers
    assert sum(shape.count * shape.macs for shape in shapes) == macs
    found = {kind: sum(s.count for s in shapes if s.activation == kind) for kind in {s.activation for s in shapes}}
    assert found == activations
    assert len({str(shape) for shape in shapes}) == len(shapes)


def test_shapes_are_what_torch_computes() -> None:
    for network in NETWORKS:
        for shape in convolutions(network):
            x = torch.empty(2, shape.in_channels, shape.height, shape.width, device="meta")
            weight = torch.empty(shape.out_channels, shape.in_channels // shape.groups, *shape.kernel, device="meta")
            y = F.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups)
            assert y.shape[2:] == shape.out_size
            assert shape.elements(2) == (x.numel(), weight.numel(), y.numel())


def test_activation_functions_are_found_and_additions_end_a_chain() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.norm(self.a(x)))
            y = self.norm(self.b(x))
            y += x
            return F.relu6(self.c(F.relu(y))) * self.d(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Net())
    shapes = convolutions_of(model, 8)
    assert [(shape.activation, shape.count) for shape in shapes] == [
        ("none", 1),
        ("relu", 1),
        ("none", 2),
        ("relu6", 1),
    ]


@pytest.mark.slow
def test_groups_of_resnet50() -> None:
    graph = fp.trace(fp.models.create("torchvision:resnet50"), torch.zeros(1, 3, 224, 224))
    assert sorted(group.size for group in graph.groups) == sorted(RESNET50_GROUPS)


def test_networks_of_torchvision_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    convolutions.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.models", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"ResNet-50 needs torchvision: pip install 'fastprune\[vision\]'"):
        convolutions("ResNet-50")
    assert convolutions("ResNet-56")
    with pytest.raises(ValueError, match="network 'VGG': must be one of ResNet-50"):
        convolutions("VGG")
