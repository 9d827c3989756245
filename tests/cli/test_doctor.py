"""The doctor: true facts, and a verdict that can be bad."""

from __future__ import annotations

import json

import pytest
import torch

from fastprune import ops, reference
from fastprune.cli import doctor as module
from fastprune.cli.doctor import doctor, try_kernels
from fastprune.cli.main import main


def test_a_healthy_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert checks["healthy"] is True
    assert checks["torch"] == torch.__version__
    assert checks["threads"] == torch.get_num_threads()
    assert checks["kernels"]["cpu"] == "ok"
    assert {"dmc", "l1", "l2", "random", "uniform"} <= set(checks["methods"])


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
