"""Variants that disagree stop the benchmark before anything is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastprune.bench import Attempted, BenchmarkError, Case, Compiled
from fastprune.bench.case import check_agreement


def case(**variants: object) -> Case:
    return Case("doubling", lambda: (torch.rand(50),), {"eager": lambda x: x + x, **variants}, bytes=400)  # type: ignore[dict-item]


def test_variants_that_agree_pass() -> None:
    assert check_agreement(case(fastprune=lambda x: 2 * x)) == {}


@pytest.mark.parametrize("variant", [lambda x: 2.01 * x, lambda x: 2 * x[1:], lambda x: x * torch.nan])
def test_a_variant_that_disagrees_is_an_error(variant: object) -> None:
    with pytest.raises(BenchmarkError, match="doubling: fastprune disagrees with eager"):
        check_agreement(case(fastprune=variant))


def test_a_compiled_variant_that_disagrees_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **mode: function)
    wrong = Compiled(lambda x: 3 * x, torch.device("cpu"))
    with pytest.raises(BenchmarkError, match="compiled disagrees with"):
        check_agreement(case(fastprune=lambda x: 2 * x, compiled=wrong))


def test_a_variant_that_fails_is_an_error() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no kernel")

    with pytest.raises(BenchmarkError, match="fastprune fails: ValueError: no kernel"):
        check_agreement(case(fastprune=fails))


def test_a_compilation_that_fails_is_reported() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("cannot be compiled")

    failures = check_agreement(case(fastprune=lambda x: 2 * x, compiled=Compiled(fails, torch.device("cpu"))))
    assert list(failures) == ["compiled"]
    assert "cannot be compiled" in failures["compiled"]


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
    with pytest.raises(BenchmarkError, match="gradient: fastprune disagrees with"):
        check_agreement(wrong)


def gradients(step: float) -> Tensor:
    """Return gradients after a rounding at a relu's kink: one element changes altogether."""
    return torch.cat([torch.ones(9999), torch.full((1,), step)])


def case_in_norm(name: str, value: object, norm: float = 5e-3) -> Case:
    variants = {"eager": lambda: (torch.zeros(3), gradients(1.0)), name: lambda: value, "fastprune": lambda: value}
    return Case("gradient", tuple, variants, bytes=1, norm=norm)


def test_agreement_in_norm_lets_a_few_elements_differ() -> None:
    zeros = torch.zeros(3)
    assert check_agreement(case_in_norm("reference", (zeros, gradients(1.4)))) == {}  # 0.4 of a norm of 100
    for wrong in (
        (zeros, gradients(1.6)),
        (zeros, gradients(torch.nan)),
        (zeros + 1e-9, gradients(1.0)),  # where 0 is expected, only 0 agrees
        (zeros, gradients(1.0).view(100, 100)),
        (zeros, gradients(1.0).double()),
        (zeros,),
    ):
        with pytest.raises(BenchmarkError, match="gradient: reference disagrees with eager"):
            check_agreement(case_in_norm("reference", wrong))


def test_an_unchecked_variant_may_differ_but_not_fail() -> None:
    variants = {"eager": torch.neg, "floor": lambda x: None, "fastprune": torch.neg}
    case = Case("negation", lambda: (torch.rand(3),), variants, bytes=24, unchecked=("floor",))
    assert check_agreement(case) == {}
    with pytest.raises(BenchmarkError, match="floor fails"):
        check_agreement(replace(case, variants={**variants, "floor": torch.linalg.inv}))
    for name in ("eager", "fastprune"):
        with pytest.raises(ValueError, match="the first and 'fastprune' must be checked"):
            replace(case, unchecked=(name,))


def test_a_failure_of_an_attempted_peer_is_reported() -> None:
    failures = check_agreement(case(cudnn=Attempted(lambda x: torch.linalg.inv(x)), fastprune=lambda x: 2 * x))
    assert list(failures) == ["cudnn"]


def test_compiled_variants_are_dropped_if_another_peer_is_left() -> None:
    compiled = Compiled(torch.neg, torch.device("cpu"))
    some = case(fastprune=lambda x: 2 * x, compiled=compiled)
    assert some.compiled == [compiled]
    assert list(some.drop_compiled().variants) == ["eager", "fastprune"]
    alone = Case("alone", tuple, {"compiled": compiled, "fastprune": torch.neg}, bytes=1)
    assert alone.drop_compiled() is alone


def test_a_case_needs_ours_a_peer_and_work() -> None:
    with pytest.raises(ValueError, match="needs 'fastprune' and a peer"):
        Case("alone", tuple, {"fastprune": torch.neg}, bytes=1)
    with pytest.raises(ValueError, match="needs the least work of the result"):
        Case("idle", tuple, {"fastprune": torch.neg, "eager": torch.neg}, bytes=0)
