"""Outcomes of runs: only what was measured is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastprune.report.log import PruningRun, read_runs
from fastprune.report.outcome import Outcome, headline, outcome_of

WriteRun = Callable[..., Path]

PLAN = {"stage": "plan", "seconds": 75.0, "measured_ms": {"full": 3.0, "planned": 1.5},
        "measured_on": {"device": "cpu", "name": "chip", "threads": 1, "batch": 2}}  # fmt: skip
PRUNED = {"stage": "result", "method": "dmc", "baseline": {"accuracy": 0.9}, "compact": {"accuracy": 0.6}}
TUNED = {"stage": "result", "method": "finetune", "compact": {"accuracy": 0.897}}


def outcome(write_run: WriteRun, *records: dict[str, Any], **settings: Any) -> Outcome:
    return outcome_of(PruningRun.read(write_run("a", list(records), **settings)))


def test_everything_measured(write_run: WriteRun) -> None:
    found = outcome(write_run, PLAN, PRUNED, TUNED)
    assert headline([found]) == ["40 % of the MACs", "2.00× faster", "−0.3 points"]
    assert found.as_row() == {
        "run": "a", "method": "dmc", "budget": "flops=0.5", "macs_full": 1000, "macs": 400, "params_full": 100,
        "params": 50, "latency_ms_full": 3.0, "latency_ms": 1.5, "accuracy_full": 0.9, "accuracy_pruned": 0.6,
        "accuracy_tuned": 0.897, "top5_full": None, "top5": None, "seconds": 75.0,
    }  # fmt: skip
    texts = found.as_texts()
    assert texts["latency"] == "1.50 ms (2.00× faster)"
    assert texts["fine-tuned"] == "89.7 % (−0.3 points)"
    assert texts["time"] == "1 min 15 s"


def test_what_is_not_measured_is_not_told(write_run: WriteRun) -> None:
    found = outcome(write_run)
    assert headline([found]) == ["40 % of the MACs"]
    assert found.accuracy is found.gain is found.latency is None
    assert [name for name, text in found.as_texts().items() if text == "–"] == [
        "latency", "accuracy before", "pruned", "fine-tuned", "top-5", "time",
    ]  # fmt: skip


def test_before_fine_tuning_is_said(write_run: WriteRun) -> None:
    assert headline([outcome(write_run, PRUNED)])[-1] == "−30.0 points before fine-tuning"


def test_an_accuracy_of_zero_is_told(write_run: WriteRun) -> None:
    found = outcome(write_run, PRUNED, {**TUNED, "compact": {"accuracy": 0.0}})
    assert found.accuracy == 0
    assert found.as_texts()["fine-tuned"] == "0.0 % (−90.0 points)"


def test_a_demonstration(write_run: WriteRun) -> None:
    stages = [{"stage": "trained", "accuracy": 0.9}, {"stage": "pruned", "accuracy": 0.5},
              {"stage": "fine-tuned", "accuracy": 0.91}]  # fmt: skip
    found = outcome(write_run, {"stage": "result", "run": "a", "stages": stages}, command="demo")
    assert (found.baseline, found.pruned, found.tuned) == (0.9, 0.5, 0.91)
    assert found.gain == pytest.approx(0.01)


def test_the_headline_of_several_runs_is_a_range(write_run: WriteRun) -> None:
    write_run("a", [PRUNED, TUNED])
    folder = write_run("b", [PRUNED], kept=(4, 3)).parent
    runs = read_runs([str(folder / "a"), str(folder / "b")])
    assert headline([outcome_of(run) for run in runs]) == ["2 runs", "40 % of the MACs", "−30.0 to −0.3 points"]


def test_steps_are_read_in_their_order(write_run: WriteRun, tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write_run(f"steps/step-{number}", [])
    write_run("steps/step-x", [])
    runs = read_runs([str(tmp_path / "steps")])
    assert [run.name for run in runs] == ["step-1", "step-2", "step-10"]


def test_top5(write_run: WriteRun) -> None:
    pruned = {**PRUNED, "baseline": {"accuracy": 0.9, "top5": 0.99}, "compact": {"accuracy": 0.6, "top5": 0.8}}
    tuned = outcome(write_run, pruned, {**TUNED, "compact": {"accuracy": 0.897, "top5": 0.985}})
    assert (tuned.as_row()["top5_full"], tuned.as_row()["top5"]) == (0.99, 0.985)
    assert tuned.as_texts()["top-5"] == "99.0 % → 98.5 %"
