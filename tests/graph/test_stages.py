"""Stages end where the resolution changes, at points that all data passes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
import zoo
from torch import Tensor, nn

import fastprune as fp
from fastprune.graph import ChannelGraph
from fastprune.graph.stages import find_stages


def traced(name: str, size: int = 64) -> ChannelGraph:
    model = fp.models.create(name) if name.startswith("resnet") else zoo.create(name)[0]
    return fp.trace(model, torch.zeros(1, 3, size, size))


@pytest.mark.parametrize(
    ("name", "ends", "sizes"),
    [
        ("resnet56", ["layer1.8.relu", "layer2.8.relu", "layer3.8.relu"], [64, 32, 16]),
        ("torchvision:resnet50", ["layer1.2.relu", "layer2.3.relu", "layer3.5.relu", "layer4.2.relu"], [16, 8, 4, 2]),
        # Blocks that change the resolution behind an expansion: the stage ends in front of the block.
        (
            "torchvision:mobilenet_v2",
            ["features.1.conv.2", "features.3", "features.6", "features.13", "features.18.2"],
            [32, 16, 8, 4, 2],
        ),
        pytest.param(
            "timm:mobilenetv1_100",
            [f"blocks.{n}.{last}.bn2.act" for n, last in ((0, 0), (1, 1), (2, 1), (3, 5), (4, 1))],
            [32, 16, 8, 4, 2],
            marks=pytest.mark.slow,
        ),
        # A chain of concatenations: the stage ends in front of the transition.
        pytest.param(
            "torchvision:densenet121",
            ["features.denseblock1", "features.denseblock2", "features.denseblock3", "relu__120"],
            [16, 8, 4, 2],
            marks=pytest.mark.slow,
        ),
        # Channel shuffles are points of other shapes.
        pytest.param(
            "torchvision:shufflenet_v2_x1_0",
            ["stage2.3", "stage3.7", "conv5.2"],
            [8, 4, 2],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_stages_of_known_networks(name: str, ends: list[str], sizes: list[int]) -> None:
    stages = find_stages(traced(name))
    assert [stage.name for stage in stages] == ends
    assert [stage.size[0] for stage in stages] == sizes
    assert all(before.end == after.start for before, after in itertools.pairwise(stages))


def test_a_stage_decides_on_the_groups_that_it_alone_makes() -> None:
    graph = traced("torchvision:resnet50")
    stages = find_stages(graph)
    assert sorted(g for stage in stages for g in stage.groups) == list(range(len(graph.groups)))
    for number, stage in enumerate(stages, 1):
        makers = {layer for g in stage.groups for layer in graph.groups[g].producers}
        assert makers - {"conv1"} == {layer.name for layer in graph.layers if layer.name.startswith(f"layer{number}.")}
        streams = [graph.groups[g] for g in stage.groups if graph.groups[g].kind == "stream"]
        assert [group.size for group in streams] == [stage.channels]


def test_a_stream_through_several_stages_belongs_to_none() -> None:
    """Shortcuts that pad with zeros: the first 16 channels are the same ones in all stages."""
    graph = traced("resnet20")
    decided = {g for stage in find_stages(graph) for g in stage.groups}
    assert {group.kind for g, group in enumerate(graph.groups) if g not in decided} == {"stream"}
    assert {graph.groups[g].kind for g in decided} == {"plain"}


def test_stages_can_be_named() -> None:
    graph = traced("torchvision:resnet50")
    stages = find_stages(graph, ["layer2", "layer4"])
    assert [stage.end for stage in stages] == [find_stages(graph)[n].end for n in (1, 3)]
    assert len(stages[0].layers) == 24
    with pytest.raises(ValueError, match=r"stages 'layer5': no point .* did you mean 'layer"):
        find_stages(graph, ["layer5"])
    with pytest.raises(ValueError, match="in the order of the network"):
        find_stages(graph, ["layer4", "layer2"])


def test_a_network_without_a_point_is_refused() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.left(x).mean((2, 3)), self.right(x).mean((2, 3))], 1))

    with pytest.raises(ValueError, match="no point between its layers"):
        find_stages(fp.trace(Apart(), torch.zeros(1, 3, 8, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo.names() if n.startswith("torchvision:")][::6])
def test_every_network_of_torchvision_has_stages(name: str) -> None:
    if name.partition(":")[2] not in torchvision.models.list_models(module=torchvision.models):
        pytest.skip("not a classification network")
    graph = traced(name, 96)
    stages = find_stages(graph)
    assert len(stages) >= 2
    assert sum(len(stage.layers) for stage in stages) >= 0.5 * len(graph.layers)
