"""Rows of layers: the weight times the patches must be the layer's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.recovery.readers import Reader

CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 7)),
    (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(2, 3)), (2, 6, 12, 11)),
    (nn.Conv2d(6, 8, 3, groups=2, stride=2), (2, 6, 9, 7)),
    (nn.Conv2d(6, 12, 5, groups=6, padding=2), (2, 6, 9, 7)),
    (nn.Conv2d(6, 8, (4, 3), padding="same"), (2, 6, 9, 7)),
    (nn.Conv2d(6, 8, 1, padding="valid"), (2, 6, 9, 7)),
    (nn.Conv1d(6, 8, 3, padding=1, stride=2), (2, 6, 11)),
    (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 6, 3)),
]


def find_reader(module: nn.Module, shape: tuple[int, ...]) -> tuple[Reader, Any]:
    network = nn.Sequential(module)
    graph = fp.trace(network, torch.randn(shape))
    nodes = {node.name: node for node in graph.traced.evaluation.graph.nodes}
    (layer,) = graph.layers
    reader = Reader.of(nodes[layer.node], layer)
    assert reader is not None
    return reader, layer


@pytest.mark.parametrize(("module", "shape"), [*CASES, (nn.Linear(6, 4), (3, 5, 6))], ids=str)
def test_patches_times_the_weight_are_the_outputs(module: nn.Module, shape: tuple[int, ...]) -> None:
    reader, _ = find_reader(module, shape)
    x, module = torch.randn(shape, dtype=torch.float64), module.double()
    y, weight = module(x), module.weight
    assert isinstance(weight, torch.Tensor)
    places = torch.randperm(reader.count_places(y))[:20]
    patches, outputs = reader.rows(x, y, weight, places)
    grouped = weight.reshape(reader.groups, weight.shape[0] // reader.groups, -1)
    shift = module.bias.reshape(reader.groups, 1, -1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(patches @ grouped.mT + shift, outputs)
    assert reader.shift is not None
    assert reader.shift.tensor == "0.bias"


def test_a_transposed_convolution_is_no_reader() -> None:
    graph = fp.trace(nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), torch.randn(2, 4, 5, 5))
    nodes = {node.name: node for node in graph.traced.evaluation.graph.nodes}
    assert [Reader.of(nodes[layer.node], layer) for layer in graph.layers] == [None]
