"""The overhead of SANP in a training step: the same arithmetic as a loop over layers, and the cost that is reported."""

from __future__ import annotations

import align
import pytest
import torch

from fastprune.bench import OURS
from fastprune.bench.case import check_agreement


@pytest.fixture(scope="module")
def case() -> align.Case:
    torch.manual_seed(0)
    (case,) = align.cases(torch.device("cpu"), quick=True)
    return case


def test_the_operator_and_the_loop_end_at_the_same_weights(case: align.Case) -> None:
    assert check_agreement(case) == {}
    images, labels = case.draw()
    ours, loop, plain = (case.variants[name](images, labels) for name in (OURS, "eager", "training"))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, loop, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, plain, strict=True))


def test_the_generator_is_charged_once_in_twenty_steps() -> None:
    seconds = {"training": 1.0, OURS: 1.02, "generator": 0.6, "eager": 1.1}
    row = {"name": "a", "variants": {name: {"median_seconds": value} for name, value in seconds.items()}}
    assert align.overheads([row]) == {"a": pytest.approx(0.05)}


def test_the_proximal_step_needs_no_memory(case: align.Case) -> None:
    assert case.more is not None
    assert case.more()["all memory"] <= 1.05
