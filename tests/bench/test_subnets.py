"""Evaluations in SP's search: slices and masks compute the same."""

from __future__ import annotations

import subnets
import torch

from fastprune.bench import OURS
from fastprune.bench.case import check_agreement


def test_slices_and_masks_give_the_same_features() -> None:
    torch.manual_seed(0)
    (case,) = subnets.cases(torch.device("cpu"), quick=True)
    assert check_agreement(case) == {}
    first, second = case.draw(), case.draw()
    assert not torch.equal(first[0], second[0])
    ours, masked = (case.variants[name](*first) for name in (OURS, "eager"))
    assert len(ours) == 3
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, masked, strict=True))
    others = case.variants[OURS](*second)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, others, strict=True))
