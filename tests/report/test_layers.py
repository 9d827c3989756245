"""Widths on the page: bars with names for some layers, a profile for many."""

from __future__ import annotations

import pytest
import torch

import fastprune as fp
from fastprune.report.layers import MOST_BARS, widths_section


@pytest.fixture(scope="module")
def plan() -> fp.PruningPlan:
    torch.manual_seed(0)
    return fp.prune(fp.models.create("resnet20"), torch.zeros(1, 3, 8, 8), method="l1", budget="flops=0.5").plan


def test_bars_of_some_layers(plan: fp.PruningPlan) -> None:
    layers = {name: size for name, (_, size) in plan.layers.items()}
    text = widths_section("w", layers, {2: ("l1 · a", plan)})
    assert text.count("<li title=") == len(layers) == 19
    kept, size = plan.layers["layer3.0.conv1"]
    assert f'<li title="layer3.0.conv1: {kept} of {size}">' in text
    assert f'style="width:{100 * kept / size:.1f}%;background:var(--series2)"' in text
    assert "<svg" not in text
    assert f'<th scope="row">layer3.0.conv1</th><td>{size}</td><td>{kept}</td>' in text


def test_a_profile_of_many_layers(plan: fp.PruningPlan) -> None:
    layers = {name: size for name, (_, size) in plan.layers.items()}
    plans = {place: (f"l1 · {place}", plan) for place in range(6)}
    assert len(layers) * (0.6 + 0.4 * len(plans)) > MOST_BARS
    text = widths_section("w", layers, plans)
    assert text.count("<svg") == 2
    assert 'class="wide"' in text
    assert 'class="narrow"' in text
    assert "<li title=" not in text
    assert text.count('<th scope="row">') == len(layers)
