"""Users' own operators: unknown ones keep their channels, rules free them, and names are not confused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.graph import Operator, rule
from fastprune.graph.labels.rules import RULES
from fastprune.networks.masked import MaskedNetwork

PAGE = Path(__file__).parents[2] / "docs" / "custom_operators.md"
IMAGES = torch.zeros(1, 3, 8, 8, dtype=torch.float64)


def same_shape(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fastprune_test::add", mutates_args=())
def add(x: Tensor, y: Tensor) -> Tensor:
    return x.flip(1) + y


@torch.library.custom_op("fastprune_test::relu", mutates_args=())
def relu(x: Tensor) -> Tensor:
    return x.flip(1).relu()


@torch.library.custom_op("fastprune_test::double", mutates_args=(), tags=(torch.Tag.pointwise,))
def double(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("fastprune_test::halves", mutates_args=())
def halves(x: Tensor, channels: int) -> Tensor:
    return torch.cat([x[:, channels // 2 :], x[:, : channels // 2]], 1)


for operator in (add, relu, double, halves):
    operator.register_fake(same_shape)


@pytest.fixture(autouse=True)
def restore_rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class Between(nn.Module):
    """Something between two convolutions."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.relu(self.first(x))))


def prune_half(graph: fp.ChannelGraph, model: nn.Module) -> nn.Module:
    mask = torch.arange(graph.num_units) % 2
    return fp.apply(graph.plan(mask), model)


@pytest.mark.parametrize(("between", "name"), [(lambda x: add(x, x), "add"), (lambda x: relu(x), "relu")])
def test_an_operator_is_not_taken_for_pytorchs_of_the_same_name(between: Any, name: str) -> None:
    graph = fp.trace(Between(between).double(), IMAGES)
    assert graph.groups == ()
    reason = dict(graph.unprunable)["first"]
    assert reason.startswith(f"fastprune_test::{name} in the model (has no rule; one can be registered")
    assert PAGE.name in reason


def test_a_pointwise_tag_is_enough() -> None:
    model = Between(lambda x: double(x)).double()
    graph = fp.trace(model, IMAGES)
    assert [group.size for group in graph.groups] == [8]
    prune_half(graph, model)


def test_the_example_of_the_documentation() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(compile(code.group(1), str(PAGE), "exec"), names)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 4, 1)
            self.weight, self.gain = nn.Parameter(torch.randn(6, 8, 3, 3)), nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(names["scaled_conv"](torch.relu(self.first(x)), self.weight, self.gain))

    model = Scaled().double()
    graph = fp.trace(model, IMAGES)
    assert [(group.name, group.size) for group in graph.groups] == [("first", 8), ("", 6)]
    mask = torch.arange(14) % 2
    plan = fp.PruningPlan.from_json(graph.plan(mask).to_json())
    compact = fp.apply(plan, model)
    assert compact.weight.shape == (3, 4, 3, 3)
    assert compact.gain.shape == (3,)
    assert int(graph.cost().macs) == 64 * 24 + 36 * 6 * 8 * 9 + 36 * 24
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gated = MaskedNetwork(graph, model)(images, mask.double())
    assert torch.allclose(gated, compact(images), rtol=1e-12)


def test_a_rule_ends_if_channels_lie_along_another_dimension() -> None:
    @rule("fastprune_test::relu")
    def rows(op: Operator, x: Any) -> Any:
        return op.result(op.channels(x, 2), 2)

    graph = fp.trace(Between(lambda x: relu(x)).double(), IMAGES)
    assert graph.groups == ()
    assert dict(graph.unprunable)["first"] == "fastprune_test::relu in the model"


def test_a_wrong_rule_makes_no_wrong_network() -> None:
    @rule("fastprune_test::relu")
    def same_channels(op: Operator, x: Any) -> Any:
        return op.result(op.channels(x, 1), 1)

    model = Between(lambda x: relu(x)).double()
    graph = fp.trace(model, IMAGES)
    assert graph.num_units == 8
    with pytest.raises(fp.SurgeryError, match="compact and masked outputs differ"):
        prune_half(graph, model)


def test_an_operator_with_the_number_of_channels_is_refused() -> None:
    @rule("fastprune_test::halves")
    def exchanged(op: Operator, x: Any, channels: int) -> Any:
        made = op.channels(x, 1)
        return op.result(made.roll(channels // 2), 1)

    model = Between(lambda x: halves(x, 8)).double()
    graph = fp.trace(model, IMAGES)
    with pytest.raises(fp.SurgeryError, match="differ"):
        fp.apply(graph.plan(torch.tensor([1, 1, 0, 0, 1, 1, 0, 0])), model)
    by_shape = Between(lambda x: halves(x, x.shape[1])).double()
    compact = fp.apply(fp.trace(by_shape, IMAGES).plan(torch.tensor([1, 0, 0, 1, 1, 1, 0, 0])), by_shape)
    assert compact.last.in_channels == 4


@pytest.mark.parametrize("name", ["relu", "aten::relu", "mine::"])
def test_rules_are_for_users_own_operators(name: str) -> None:
    with pytest.raises(ValueError, match=r"give the name of an operator of your own"):
        rule(name)
