"""Models whose own code holds numbers of channels: the code goes on on fewer of them, with the numbers changed."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.networks.subnetworks import SubNetworks

IMAGE = torch.zeros(2, 3, 8, 8)


class Halves(nn.Module):
    """Splits at a width that it holds, as YOLO's C3k2 does; ``spare`` has another meaning and the same value."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.spare = width
        self.wide, self.deep = nn.Conv2d(3, 2 * width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(3 * width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).relu().split((self.width, self.width), 1)
        return self.head(torch.cat([a, b, self.deep(b).relu()], 1)).mean((2, 3))


class Chunks(Halves):
    """Cuts where the channels end, and holds the width for another way to run."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).relu().chunk(2, 1)
        return self.head(torch.cat([a, b, self.deep(b).relu()], 1)).mean((2, 3))

    def forward_split(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Parts(nn.Module):
    """Splits at a list of widths, as MixNet's convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = [4, 6]
        self.stem = nn.Conv2d(3, 10, 1)
        self.branches = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, groups=n) for n in self.widths)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.stem(x).split(self.widths, 1)
        joined = torch.cat([branch(part) for branch, part in zip(self.branches, parts, strict=True)], 1)
        return self.head(joined.relu()).mean((2, 3))


class Ahead(nn.Module):
    """Adds a shortcut to its first channels, as ReXNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = 4
        self.stem, self.wide, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 10, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.wide(x)
        y = torch.cat([y[:, : self.first] + x, y[:, self.first :]], 1)
        return self.head(y.relu()).mean((2, 3))


class Attention(nn.Module):
    """Takes the number of values from the shape of its input, as YOLO's attention does: the two are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed, self.head = nn.Conv2d(3, 8, 1), Mixed(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(self.stem(x))).mean((2, 3))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.make(x).flatten(2).view(n, c, h, w) + x.mean((2, 3), keepdim=True).sum(1, keepdim=True)


def plan_of(model: nn.Module, left: float = 2 / 3, **options: Any) -> fp.PruningPlan:
    graph = fp.trace(model, IMAGE, **options)
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[group.units][max(1, round(group.size * left)) :] = 0
    return graph.plan(mask)


def test_an_attribute_that_holds_a_width_follows_it() -> None:
    torch.manual_seed(0)
    model = Halves()
    plan = plan_of(model)
    compact = fp.apply(plan, model)
    assert type(compact) is Halves
    assert (compact.width, compact.spare, model.width) == (4, 6, 6)
    assert plan.attributes == {"width": ((6,), (4,))}
    assert compact.train()(IMAGE).shape == (2, 4)


def test_unequal_halves_need_the_rewritten_graph_unless_the_class_must_stay() -> None:
    torch.manual_seed(0)
    model = Halves()
    graph = fp.trace(model, IMAGE)
    mask = torch.ones(graph.num_units)
    mask[graph.groups[0].start] = 0
    plan = graph.plan(mask)
    assert plan.attributes == {}
    assert isinstance(fp.apply(plan, model), fp.RewrittenNetwork)
    own = fp.trace(model, IMAGE, rewrite=False)
    assert own.num_units < graph.num_units
    for unit in range(own.num_units):
        mask = torch.ones(own.num_units)
        mask[unit] = 0
        assert type(fp.apply(own.plan(mask), model)) is Halves


def test_a_width_that_the_traced_code_does_not_read_follows_too() -> None:
    torch.manual_seed(0)
    model = Chunks()
    compact = fp.apply(plan_of(model), model)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(compact.forward_split(images), compact(images))


def test_a_list_of_widths_follows() -> None:
    torch.manual_seed(0)
    model = Parts()
    plan = plan_of(model, 1 / 2)
    compact = fp.apply(plan, model)
    assert type(compact) is Parts
    assert compact.widths == [2, 3]
    assert model.widths == [4, 6]
    assert type(fp.apply(plan_of(model, 1 / 2, rewrite=False), model)) is Parts


def test_a_place_to_cut_at_follows() -> None:
    torch.manual_seed(0)
    model = Ahead()
    plan = plan_of(model, 1 / 2, rewrite=False)
    compact = fp.apply(plan, model)
    assert type(compact) is Ahead
    assert compact.first == 2
    assert plan.widths == {"stem": (2, 4), "wide": (3, 6)}


@pytest.mark.parametrize("kind", [Halves, Parts, Ahead])
def test_sub_networks_on_slices_of_the_weights_compute_the_same(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    graph = fp.trace(model, IMAGE, rewrite=False)
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[group.units][group.size // 2 :] = 0
    images = torch.randn(2, 3, 8, 8)
    compact = fp.apply(graph.plan(mask), model)
    assert torch.allclose(SubNetworks(graph, model)(images, mask=mask.bool()), compact(images), atol=1e-6)


class Pair(NamedTuple):
    first: int
    second: int


class Named(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.widths: Any = Pair(4, 6)


class Twice(nn.Module):
    """Cuts two values at one number."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.left, self.right = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x).split((self.width, self.width), 1)
        c, d = self.right(x).split((self.width, self.width), 1)
        return self.head(torch.cat([a * 1.0, b.relu(), c, d.relu()], 1)).mean((2, 3))


class Half(nn.Module):
    """Cuts at half of its channels; ``width`` is a size of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.stem, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        half = y.shape[1] // 2
        return self.head(torch.cat([y[:, :half], y[:, half:].relu()], 1)).mean((2, 3))

    def other(self, x: Tensor) -> Tensor:
        return x.view(self.width, -1)


class Counting(nn.Module):
    """Has a number that is no width, and the value of one."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = 16
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu().mean((2, 3)).view(x.shape[0], -1))

    def loss(self, y: Tensor) -> Tensor:
        return y.sum() / self.samples


def test_a_number_that_is_no_size_in_the_code_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Counting()
    plan = plan_of(model)
    assert plan.attributes == {}
    assert fp.apply(plan, model).samples == 16


def test_a_sequence_of_another_kind_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Named()
    compact = fp.apply(plan_of(model, 1 / 2), model)
    assert isinstance(compact, fp.RewrittenNetwork)


@pytest.mark.parametrize("kind", [Halves, Twice, Half])
@pytest.mark.parametrize("method", ["l1", "random"])
def test_a_pruning_that_keeps_the_class_ends(kind: type[nn.Module], method: str) -> None:
    torch.manual_seed(0)
    model = kind()
    try:
        result = fp.prune(model, IMAGE, method=method, budget=0.6, rewrite=False)
    except fp.BudgetError:  # what the code needs is more than the budget
        assert kind is not Halves
    else:
        assert type(result.model) is kind


def test_layers_of_torch_are_not_taken_for_the_code_that_fails() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
            self.fixed = Fixed()

        def forward(self, x: Tensor) -> Tensor:
            return self.fixed(self.before(x))

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.reader, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.reader(self.wide(x)[:, 2:6])).mean((2, 3))

    torch.manual_seed(0)
    graph = fp.trace(Big(), IMAGE, rewrite=False)
    assert "before.0" in [group.name for group in graph.groups]


def test_channels_stay_that_the_code_of_a_module_needs() -> None:
    torch.manual_seed(0)
    model = Attention()
    graph = fp.trace(model, IMAGE, rewrite=False)
    reasons = dict(graph.unprunable)
    assert reasons["mixed.make"] == "the code of mixed (needs all channels)"
    for unit in range(graph.num_units):
        mask = torch.ones(graph.num_units)
        mask[unit] = 0
        assert type(fp.apply(graph.plan(mask), model)) is Attention


def test_a_plan_in_a_file_changes_the_attributes_of_another_copy() -> None:
    torch.manual_seed(0)
    model = Parts()
    plan = plan_of(model, 1 / 2)
    read = fp.PruningPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read.attributes == {"widths": ((4, 6), (2, 3))}
    assert fp.apply(read, Parts()).widths == [2, 3]
    other = Parts()
    other.widths = [5, 5]
    with pytest.raises(fp.PlanError, match=r"'widths' is \[5, 5\], the plan needs \[4, 6\]"):
        fp.apply(read, other)


@pytest.mark.parametrize("planned", [[2], [2, 0], "2"])
def test_a_damaged_attribute_is_no_plan(planned: object) -> None:
    values = plan_of(Parts(), 1 / 2).to_json()
    values["attributes"][0]["planned"] = planned
    with pytest.raises(fp.PlanError, match="not a pruning plan"):
        fp.PruningPlan.from_json(values)


def test_two_plans_join_to_one() -> None:
    torch.manual_seed(0)
    model = Halves()
    first = plan_of(model)
    compact = fp.apply(first, model)
    second = plan_of(compact, 1 / 2)
    both = first.then(second)
    assert both.attributes == {"width": ((6,), (2,))}
    assert type(fp.apply(both, model)) is Halves
