"""Widths by place in the block, and by budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprune as fp
from fastprune.report.block_widths import block_widths, budget_widths, places_of, split_name
from fastprune.report.log import PruningRun

WriteRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("layer1.0.conv2", ("layer1.0", "conv2")),
        ("features.3.conv.0.0", ("features.3", "conv.0.0")),
        ("blocks.1.0.conv_pw", ("blocks.1.0", "conv_pw")),
        ("stages.0.blocks.1.conv1", ("stages.0.blocks.1", "conv1")),
        ("layer2.0.downsample.0", ("layer2.0", "downsample.0")),
        ("conv1", None),
        ("features.0", None),
    ],
)
def test_a_layers_block_and_place(layer: str, expected: tuple[str, str] | None) -> None:
    assert split_name(layer) == expected


def test_places_keep_the_order_of_the_network() -> None:
    layers = ["stem", "a.0.conv1", "a.0.conv2", "a.1.conv1", "a.1.conv2"]
    assert places_of(layers) == {"conv1": ["a.0.conv1", "a.1.conv1"], "conv2": ["a.0.conv2", "a.1.conv2"]}


@pytest.fixture
def pruned(write_run: WriteRun) -> Callable[..., PruningRun]:
    """Return a function that writes a run with a real plan for a bottleneck network of four blocks."""
    torch.manual_seed(0)
    graph = fp.trace(Bottlenecks(), torch.zeros(1, 8, 8, 8))

    def prune(name: str, keep: dict[str, int], **settings: Any) -> PruningRun:
        mask = torch.ones(graph.num_units, dtype=torch.bool)
        for group in graph.groups:
            if group.name in keep:
                mask[group.start + keep[group.name] : group.start + group.size] = False
        place = write_run(name, [], **settings)
        graph.plan(mask).save(place / "plan.json")
        return PruningRun.read(place, name)

    return prune


class Block(torch.nn.Module):
    """A bottleneck block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(8, 4, 1), torch.nn.Conv2d(4, 6, 3, padding=1)
        self.conv3 = torch.nn.Conv2d(6, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's features."""
        return torch.relu(x + self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x))))))


class Bottlenecks(torch.nn.Module):
    """Four blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = torch.nn.Conv2d(8, 8, 1), torch.nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return class scores."""
        return self.blocks(self.stem(x)).mean((2, 3))


def test_widths_at_each_place(pruned: Callable[..., PruningRun]) -> None:
    one = pruned("one", {"blocks.0.conv1": 1, "blocks.3.conv1": 3, "blocks.2.conv2": 5})
    two = pruned("two", {"blocks.1.conv1": 2}, method="sp", sp={"relative": True})
    seed = pruned("seed", {"blocks.1.conv1": 1}, method="sp", sp={"relative": True}, seed=1)
    (panels,) = block_widths([one, two, seed])
    assert [panel.title for panel in panels] == ["conv1", "conv2"]  # conv3 keeps its channels in all runs
    assert panels[0].full == [4, 4, 4, 4]
    assert panels[0].kept == {"dmc": (0, [1, 4, 4, 3]), "sp": (1, [4, 2, 4, 4])}
    assert panels[1].kept == {"dmc": (0, [6, 6, 5, 6]), "sp": (1, [6, 6, 6, 6])}


def test_networks_without_blocks(write_run: WriteRun, pruned: Callable[..., PruningRun]) -> None:
    assert block_widths([PruningRun.read(write_run("a", []))]) == []
    assert (
        block_widths([PruningRun.read(write_run("b", [{"stage": "search", "epoch": 0, "step": 1}], kept=None))]) == []
    )
    assert block_widths([pruned("full", {})]) == []


def test_widths_budget_by_budget(pruned: Callable[..., PruningRun]) -> None:
    dp = {"method": "dp", "dp": {}}
    runs = [
        pruned("a", {"blocks.0.conv1": 2}),
        pruned("b", {"blocks.0.conv1": 3}, **dp),
        pruned("c", {"blocks.2.conv2": 1}, budget="flops=0.35", **dp),
    ]
    (panels,) = budget_widths(runs)
    assert [panel.title for panel in panels] == ["budget flops=0.5", "budget flops=0.35"]
    assert panels[0].full == panels[1].full == [4, 6]  # the layers that some run prunes
    assert panels[0].kept == {"dmc": (0, [2, 6]), "dp": (1, [3, 6])}
    assert panels[1].kept == {"dp": (1, [4, 1])}
    assert budget_widths(runs[:2]) == []  # one budget: the figure of all widths shows it
    assert budget_widths(runs[1:]) == []  # nothing to compare
