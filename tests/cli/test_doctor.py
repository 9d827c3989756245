"""The doctor tells true facts, and finds what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from fastprune import ops, reference
from fastprune.cli import doctor as module
from fastprune.cli.doctor import doctor, find_fault, try_kernels
from fastprune.cli.main import main
from fastprune.ops.examples import Example, examples


def test_a_healthy_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert checks["healthy"] is True
    assert checks["torch"] == torch.__version__
    assert checks["threads"] == torch.get_num_threads()
    assert checks["kernels"]["cpu"] == "ok"
    assert {"dmc", "l1", "l2", "random", "uniform"} <= set(checks["methods"])


def test_every_operator_is_compared() -> None:
    assert {example.operator for example in examples()} == set(ops.__all__) - {"UnitTable"}  # group_prox_ takes one


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.operator)
def test_a_wrong_result_or_gradient_is_found(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, example.operator)
    assert find_fault(example, torch.device("cpu")) is None
    monkeypatch.setattr(ops, example.operator, lambda *given, **named: right(*given, **named) * 1.01)
    assert "differs from its reference by" in str(find_fault(example, torch.device("cpu")))
    if example.operator != "group_prox_":  # it has no gradient

        def with_other_gradient(*given: object, **named: object) -> torch.Tensor:
            result = right(*given, **named)
            return result.detach() + 1.01 * (result - result.detach())

        monkeypatch.setattr(ops, example.operator, with_other_gradient)
        assert "differs from its reference by" in str(find_fault(example, torch.device("cpu")))


def test_a_kernel_that_differs_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = reference.topk_mask
    monkeypatch.setattr(module.ops, "topk_mask", lambda *given: right(*given) + 0.01)
    assert try_kernels(torch.device("cpu")) == "topk_mask differs from its reference by 1.0e-02"
    assert main(["doctor"]) == 1
    assert "differs" in capsys.readouterr().out


def test_a_kernel_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ops, "topk_mask", fails)
    checks = doctor()
    assert checks["kernels"]["cpu"] == "topk_mask fails: no kernel image"
    assert checks["healthy"] is False


def test_a_broken_plugin_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.registry, "broken", lambda: {"mine": "method 'mine' cannot be imported"})
    checks = doctor()
    assert checks["healthy"] is False
    assert checks["broken_methods"] == {"mine": "method 'mine' cannot be imported"}
