"""Limits of widths: they hold for every ranking, and contradictions are refused."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastprune as fp
from fastprune.planning.budget import Budget, BudgetError
from fastprune.planning.fitting import fit
from fastprune.planning.limits import LimitError, Limits


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 32, 3), nn.ReLU(), nn.Conv2d(32, 20, 3, groups=4), nn.ReLU(),
        nn.Flatten(), nn.Linear(20 * 4, 5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> fp.ChannelGraph:
    return fp.trace(net(), torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def resnet() -> fp.ChannelGraph:
    return fp.trace(torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64))


def scores_of(graph: fp.ChannelGraph, seed: int = 0) -> torch.Tensor:
    return torch.randn(graph.num_units, generator=torch.Generator().manual_seed(seed))


def widths(graph: fp.ChannelGraph, mask: torch.Tensor) -> list[int]:
    return [int(mask[group.units].sum()) for group in graph.groups]


def test_the_network_of_these_tests(graph: fp.ChannelGraph) -> None:
    assert [(g.name, g.size) for g in graph.groups] == [("0", 12), ("2", 8), ("4", 5)]  # grouped: a unit of 4 channels


def test_allowed_widths_are_multiples_of_channels_or_all(graph: fp.ChannelGraph) -> None:
    first, second, third = Limits(round_to=8).widths(graph)
    assert [n for n in range(13) if n in first] == [8, 12]  # a layer of 12 is not left untouched
    assert [n for n in range(9) if n in second] == [2, 4, 6, 8]  # two units are 8 channels
    assert [n for n in range(6) if n in third] == [2, 4, 5]


@pytest.mark.parametrize("round_to", [4, 8, 16])
@pytest.mark.parametrize("text", ["flops=0.5", "params=0.3"])
def test_channels_of_real_layers_are_multiples(resnet: fp.ChannelGraph, round_to: int, text: str) -> None:
    budget = Budget.parse(text)
    mask = fit(resnet, budget, scores_of(resnet), limits=Limits(round_to=round_to))
    assert all(width % round_to == 0 for width in widths(resnet, mask))
    assert 0.93 * budget.limit(resnet) < float(budget.cost(resnet, mask)) <= budget.limit(resnet)


def test_compact_layers_have_rounded_widths() -> None:
    model = torchvision.models.resnet18()
    result = fp.prune(
        model, torch.zeros(1, 3, 64, 64), method="l1", budget="flops=0.4", ranking="global", limits=Limits(round_to=8)
    )
    convolutions = [m for m in result.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.out_channels % 8 == 0 for m in convolutions)
    assert sum(m.out_channels for m in convolutions) < 0.9 * 4800


def test_the_best_blocks_stay(resnet: fp.ChannelGraph) -> None:
    scores = scores_of(resnet)
    mask = fit(resnet, Budget("flops", 0.5), scores, limits=Limits(round_to=8))
    for group in resnet.groups:
        part, stays = scores[group.units], mask[group.units]
        if not bool(stays.all()):
            assert part[stays].min() >= part[~stays].max()


def test_ratios_hold_for_the_layers_named(resnet: fp.ChannelGraph) -> None:
    limits = Limits(keep_ratios={"layer1": (0.8, 1.0), "layer4.*.conv1": (0.0, 0.125), "*": (0.1, 1.0)})
    mask = fit(resnet, Budget("flops", 0.5), scores_of(resnet), limits=limits)
    kept = {group.name: int(mask[group.units].sum()) / group.size for group in resnet.groups}
    assert kept["layer1.0.conv1"] >= 0.8
    assert kept["layer1.1.conv1"] >= 0.8
    assert kept["conv1"] >= 0.8  # its stream is made by convolutions of layer1, too
    assert 0.1 <= kept["layer4.0.conv1"] <= 0.125
    assert 0.1 <= kept["layer4.1.conv1"] <= 0.125
    assert min(kept.values()) >= 0.1


def test_a_smallest_part_is_rounded_up_and_a_largest_part_down() -> None:
    graph = fp.trace(nn.Sequential(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 2, 1)), torch.zeros(1, 3, 4, 4))
    (allowed,) = Limits(keep_ratios={"0": (0.31, 0.79)}).widths(graph)
    assert (allowed.least, allowed.most) == (4, 7)
    (allowed,) = Limits(keep_ratios={"0": (0.3, 0.7)}).widths(graph)
    assert (allowed.least, allowed.most) == (3, 7)  # 0.3 · 10 counts as 3, despite floating point
    (allowed,) = Limits(round_to=4, keep_ratios={"0": (0.31, 0.95)}).widths(graph)
    assert (allowed.least, allowed.most) == (4, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(min_keep=0), "at least 1 unit"),
        (lambda: Limits(round_to=0), "round_to 0"),
        (lambda: Limits(keep_ratios={"a": (0.5, 0.4)}), "a=0.5:0.4"),
        (lambda: Limits(keep_ratios={"a": (0.0, 0.0)}), "most > 0"),
        (lambda: Limits(keep_ratios={"a": (0.0, 1.5)}), "<= 1"),
        (lambda: Limits.parse(["layer1"]), "'layer1': write PATTERN=LEAST:MOST"),
        (lambda: Limits.parse(["layer1=0.5"]), "write PATTERN=LEAST:MOST"),
        (lambda: Limits.parse(["layer1=a:b"]), "write PATTERN=LEAST:MOST"),
    ],
)
def test_limits_out_of_range(make, message):  # type: ignore[no-untyped-def]
    with pytest.raises(LimitError, match=message):
        make()


def test_settings_are_parsed_back() -> None:
    limits = Limits(3, 8, {"a.*": (1 / 3, 0.5), "b=c": (0.0, 1.0)})
    assert Limits.parse(**limits.as_settings()) == limits


def test_contradictions_name_the_group(graph: fp.ChannelGraph) -> None:
    with pytest.raises(LimitError, match=r"group '0' of 12 units cannot keep to its limits .*at least 8 and at most 0"):
        Limits(round_to=8, keep_ratios={"0": (0.0, 0.5)}).widths(graph)
    with pytest.raises(LimitError, match="group '2' of 8 units"):
        Limits(min_keep=5, keep_ratios={"2": (0.0, 0.5)}).widths(graph)


def test_patterns_need_a_layer_with_channels_that_can_go(resnet: fp.ChannelGraph) -> None:
    with pytest.raises(LimitError, match=r"'layer1.0.conv3': no layer has such a name; did you mean 'layer1.0.conv"):
        Limits(keep_ratios={"layer1.0.conv3": (0.5, 1.0)}).widths(resnet)
    with pytest.raises(LimitError, match="'fc': none of its layers has channels that can go"):
        Limits(keep_ratios={"fc": (0.5, 1.0)}).widths(resnet)


def test_units_that_may_not_go_contradict_a_largest_part(resnet: fp.ChannelGraph) -> None:
    nothing = torch.ones(resnet.num_units, dtype=torch.bool)
    nothing[resnet.groups[0].units] = False
    with pytest.raises(LimitError, match="group 'conv1': 64 of its 64 units may not go"):
        fit(
            resnet, Budget("flops", 0.5), scores_of(resnet), prunable=nothing,
            limits=Limits(keep_ratios={"conv1": (0.0, 0.5)}),
        )  # fmt: skip


def test_a_budget_out_of_reach_names_the_limits(resnet: fp.ChannelGraph) -> None:
    with pytest.raises(BudgetError, match=r"limits: keep_ratio \*=0\.9:1.*most of it in conv1"):
        fit(resnet, Budget("flops", 0.5), scores_of(resnet), limits=Limits(keep_ratios={"*": (0.9, 1.0)}))


def test_a_plan_that_breaks_its_limits_is_refused(resnet: fp.ChannelGraph) -> None:
    mask = fit(resnet, Budget("flops", 0.5), scores_of(resnet))
    assert Limits().broken_by(resnet, mask) is None
    broken = Limits(round_to=8).broken_by(resnet, mask)
    assert broken is not None
    assert "a multiple of 8 (or all 64) from 8 to 64 must" in broken


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    round_to=st.integers(1, 9),
    min_keep=st.integers(1, 9),
    least=st.floats(0, 0.5),
    part=st.floats(0.3, 0.99),
)
def test_fit_keeps_to_any_limits(
    graph: fp.ChannelGraph, seed: int, round_to: int, min_keep: int, least: float, part: float
) -> None:
    limits = Limits(min_keep, round_to, {"*": (least, 1.0)})
    budget = Budget("params", part)
    try:
        mask = fit(graph, budget, scores_of(graph, seed), limits=limits)
    except BudgetError:
        smallest = torch.zeros(graph.num_units)
        for group, allowed in zip(graph.groups, limits.widths(graph), strict=True):
            smallest[group.start : group.start + allowed.least] = 1
        assert float(budget.cost(graph, smallest)) > budget.limit(graph)
    else:
        assert limits.broken_by(graph, mask) is None
        assert float(budget.cost(graph, mask)) <= budget.limit(graph)
        # Nothing more fits: no single further step of any group, or the slack is below half a percent.
        gap = budget.limit(graph) - float(budget.cost(graph, mask))
        if gap > 0.005 * float(budget.cost(graph)):
            for group, allowed in zip(graph.groups, limits.widths(graph), strict=True):
                kept = int(mask[group.units].sum())
                following = allowed.at_least(kept + 1)
                if kept < allowed.most:
                    more = mask.clone()
                    closed = (~mask[group.units]).nonzero().flatten()[: following - kept]
                    more[group.start + closed] = True
                    assert float(budget.cost(graph, more)) > budget.limit(graph)
