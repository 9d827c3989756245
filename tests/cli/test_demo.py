"""The demonstration keeps its promises."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fastprune.cli import demo as module
from fastprune.cli.demo import DemoSettings, demo, one_thread
from fastprune.engine import RunDirectory, RunError


def test_one_thread_and_back() -> None:
    inside: list[int] = []
    torch.set_num_threads(2)
    try:
        with suppress(KeyError), one_thread():
            inside.append(torch.get_num_threads())
            raise KeyError
        assert inside == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_an_existing_directory_is_refused_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train", lambda *given, **named: pytest.fail("trained first"))
    with pytest.raises(RunError, match="exists already: give another --out"):
        demo(DemoSettings(out=str(tmp_path)))


@pytest.mark.slow
def test_stages_of_a_short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BASELINE", dataclasses.replace(module.BASELINE, epochs=2))
    monkeypatch.setattr(module, "FINETUNE", dataclasses.replace(module.FINETUNE, epochs=1))
    monkeypatch.setattr(module, "SEARCH", {**module.SEARCH, "epochs": 2})
    result = demo(DemoSettings(out=str(tmp_path / "run")))
    trained, pruned, tuned = result["stages"]
    assert [stage["stage"] for stage in result["stages"]] == ["trained", "pruned", "fine-tuned"]
    assert trained["macs"] == 2_516_608  # ResNet-20 on 1x8x8
    assert 0.49 * trained["macs"] <= pruned["macs"] <= 0.5 * trained["macs"]
    assert (tuned["macs"], tuned["params"]) == (pruned["macs"], pruned["params"])
    assert all(stage["latency_ms"] > 0 for stage in result["stages"])
    assert trained["accuracy"] > 0.2  # two epochs of ten classes: better than chance
    run = RunDirectory.open(result["run"])
    assert run.config["command"] == "demo"
    assert run.config["dmc"]["epochs"] == 2
    assert run.metrics()[-1]["stages"] == result["stages"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_comes_back_within_a_point(seed: int, tmp_path: Path) -> None:
    begun = time.process_time()
    result = demo(DemoSettings(out=str(tmp_path / "run"), seed=seed))
    spent = time.process_time() - begun  # on a busy machine the clock says nothing of the demo
    trained, pruned, tuned = (stage["accuracy"] for stage in result["stages"])
    assert trained > 0.97
    assert pruned > 0.75
    assert tuned >= trained - 0.01
    assert spent < 120
