"""Variants agree before they are timed, or the benchmark stops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastprune.bench import BenchmarkError, Case, Compiled
from fastprune.bench.case import check_agreement


def case(**variants: object) -> Case:
    return Case("doubling", lambda: (torch.rand(50),), {"eager": lambda x: x + x, **variants}, bytes=400)  # type: ignore[dict-item]


def test_variants_that_agree() -> None:
    assert check_agreement(case(fastprune=lambda x: 2 * x)) == {}


@pytest.mark.parametrize("variant", [lambda x: 2.01 * x, lambda x: 2 * x[1:], lambda x: x * torch.nan])
def test_a_variant_that_computes_something_else_is_an_error(variant: object) -> None:
    with pytest.raises(BenchmarkError, match="doubling: fastprune computes something else than eager"):
        check_agreement(case(fastprune=variant))


def test_a_compiled_variant_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **mode: function)
    wrong = Compiled(lambda x: 3 * x, torch.device("cpu"))
    with pytest.raises(BenchmarkError, match="compiled computes something else"):
        check_agreement(case(fastprune=lambda x: 2 * x, compiled=wrong))


def test_a_variant_that_fails_is_an_error() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no kernel")

    with pytest.raises(BenchmarkError, match="fastprune fails: ValueError: no kernel"):
        check_agreement(case(fastprune=fails))


def test_a_compilation_that_fails_is_told() -> None:
    def cannot(x: Tensor) -> Tensor:
        raise ValueError("not to be compiled")

    failures = check_agreement(case(fastprune=lambda x: 2 * x, compiled=Compiled(cannot, torch.device("cpu"))))
    assert list(failures) == ["compiled"]
    assert "not to be compiled" in failures["compiled"]


def test_variants_may_change_their_inputs() -> None:
    doubling = Case(
        "in place",
        lambda: (torch.rand(50), [torch.rand(3)]),
        {"eager": lambda x, rest: (x.mul_(2), rest[0].neg_()), "fastprune": lambda x, rest: (2 * x, -rest[0])},
        bytes=400,
    )
    assert check_agreement(doubling) == {}


def test_gradients_are_compared() -> None:
    def gradient(x: Tensor, factor: float) -> Tensor:
        return torch.autograd.grad((x**2).sum() * factor, x)[0]

    wrong = Case(
        "gradient",
        lambda: (torch.rand(5, requires_grad=True),),
        {"eager": lambda x: gradient(x, 1.0), "fastprune": lambda x: gradient(x, 1.1)},
        bytes=40,
    )
    with pytest.raises(BenchmarkError, match="gradient: fastprune computes something else"):
        check_agreement(wrong)


def test_a_case_needs_ours_a_peer_and_work() -> None:
    with pytest.raises(ValueError, match="needs 'fastprune' and one to compare with"):
        Case("alone", tuple, {"fastprune": torch.neg}, bytes=1)
    with pytest.raises(ValueError, match="needs the least work of the result"):
        Case("idle", tuple, {"fastprune": torch.neg, "eager": torch.neg}, bytes=0)
