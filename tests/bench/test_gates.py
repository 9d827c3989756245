"""The eager gates draw other numbers, but are open as often as ours."""

from __future__ import annotations

import pytest
import torch

from fastprune.bench import gates


@pytest.mark.parametrize("gate", gates.GATES)
def test_eager_draws_from_the_same_distribution(gate: str) -> None:
    torch.manual_seed(0)
    units = 100_000
    case = gates.case(gate, "100,000 units", units, torch.device("cpu"))
    values, dy, step = case.draw()
    results = {name: variant(values, dy, step) for name, variant in case.variants.items()}
    for opened, gradient in results.values():
        assert set(opened.round(decimals=5).unique().tolist()) == {0.0, 1.0}
        assert abs(float(opened.mean() - results["fastprune"][0].mean())) < 4 * units**-0.5
        assert float(gradient.abs().mean()) == pytest.approx(float(results["fastprune"][1].abs().mean()), rel=0.05)


def test_every_call_draws_new_noise() -> None:
    draw = gates.case("bernoulli_gate", "10 units", 10, torch.device("cpu")).draw
    assert [draw()[2] for _ in range(3)] == [0, 1, 2]
