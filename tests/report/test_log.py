"""Logs as a report reads them: epochs, curves, bands over seeds, budgets, and logs that it refuses."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastprune.engine import RunError
from fastprune.graph.plan import PlanError
from fastprune.report.log import PruningRun, lines, number, read_runs

WriteRun = Callable[..., Path]


def searched(*records: dict[str, Any], phase: str = "gates") -> list[dict[str, Any]]:
    return [{"stage": "search", "phase": phase, **record} for record in records]


# 40 steps an epoch, a line every 25 steps and at each end; the last epoch was not finished.
LINES = searched(
    {"epoch": 0, "step": 25, "regulariser": 0.5},
    {"epoch": 0, "step": 40, "regulariser": 0.4, "keep/conv1": 1.0, "keep/conv2": 0.5},
    {"epoch": 1, "step": 50, "regulariser": None},
    {"epoch": 1, "step": 75, "regulariser": 0.2},
    {"epoch": 1, "step": 80, "proxy_accuracy": 0.75, "keep/conv1": 0.5, "keep/conv2": 0.25},
    {"epoch": 2, "step": 100, "regulariser": 0.1},
)


def test_places_in_epochs_and_steps(write_run: WriteRun) -> None:
    others = [{"stage": "finetune", "phase": "train", "epoch": 0, "step": 9, "regulariser": 7}]
    run = PruningRun.read(write_run("a", LINES + others))
    assert run.epochs == [0.625, 1, 1.25, 1.875, 2, 2.5]
    assert run.curve("proxy_accuracy") == {2: 0.75}
    curve = run.curve("regulariser", "steps")
    assert list(curve) == [25, 40, 50, 75, 100]
    assert math.isnan(curve.pop(50))
    assert list(curve.values()) == [0.5, 0.4, 0.2, 0.1]
    assert run.kept == {"conv1": {1: 1.0, 2: 0.5}, "conv2": {1: 0.5, 2: 0.25}}
    assert run.curve("nope") == {}


def test_phases_follow_one_another(write_run: WriteRun) -> None:
    first = searched({"epoch": 0, "step": 10}, {"epoch": 1, "step": 20})
    second = searched({"epoch": 0, "step": 22}, {"epoch": 0, "step": 24}, {"epoch": 1, "step": 28}, phase="more")
    third = searched({"epoch": 0, "step": 31}, phase="last")
    assert PruningRun.read(write_run("a", first + second + third)).epochs == [1, 2, 2.5, 3, 4, 5]


def test_runs_that_differ_in_the_seed_only_are_a_band(write_run: WriteRun) -> None:
    def made(name: str, values: list[float], **settings: Any) -> str:
        records = [{"epoch": n, "step": n + 1, "randomness": value} for n, value in enumerate(values)]
        return str(write_run(name, searched(*records), **settings))

    runs = read_runs(
        [
            made("s0", [0.5, 0.4, 0.3], seed=0),
            made("other", [0.1], seed=2, dmc={"epochs": 3}),  # another option
            made("s1", [0.3, 0.1], seed=1),  # stopped early
            made("again", [0.2], seed=0),  # the same seed
            made("without", [], method="l1", l1={}),
        ]
    )
    band, other, again = lines(runs, lambda _: "randomness")
    assert (band.number, band.label, band.x) == (0, "dmc · s0, s1 (mean, min to max)", [1, 2])
    assert (band.y, band.low, band.high) == (pytest.approx([0.4, 0.25]), [0.3, 0.1], [0.5, 0.4])
    assert (other.number, other.label, other.y, other.low) == (1, "dmc · other", [0.1], None)
    assert (again.number, again.label) == (3, "dmc · again")


def test_names_tell_runs_apart(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write_run("x/run", LINES), write_run("y/run", LINES)
    assert [run.name for run in read_runs([str(one), str(two)])] == ["x/run", "y/run"]
    monkeypatch.chdir(one)
    assert read_runs(["."])[0].label == "dmc · run"
    with pytest.raises(ValueError, match=r"--run \.: this run is given twice"):
        read_runs([str(one), "."])


@pytest.mark.parametrize(
    ("budget", "plan", "part"),
    [
        ("flops=0.3", {}, 0.3),
        # The plan's 400 MACs are 0.4 of the network that was searched, so the budget is half of it.
        ("flops=500K", {"macs": {"planned": 400e3}, "search": {"flops_of_plan": 0.4}}, 0.5),
        ("latency=6ms", {"ms": {"planned": 5.0}, "search": {"latency_of_plan": 0.5}}, 0.6),
        ("flops=500K", {}, None),
        ("auth=500K", {"macs": {"planned": 400e3}, "search": {"auth_of_plan": 0.4}}, None),
    ],
)
def test_budget_as_a_fraction_of_the_full_cost(
    budget: str, plan: dict[str, Any], part: float | None, write_run: WriteRun
) -> None:
    run = PruningRun.read(write_run("a", [{"stage": "plan", **plan}], budget=budget))
    assert run.budget_part == (None if part is None else pytest.approx(part))


def test_the_newest_line_counts(write_run: WriteRun) -> None:
    results = [
        {"stage": "result", "method": "dmc", "compact": {"accuracy": 0.5}},
        {"stage": "result", "method": "finetune", "compact": {"accuracy": 0.8}},
        {"stage": "result", "method": "finetune", "compact": {"accuracy": 0.9}},
    ]
    run = PruningRun.read(write_run("a", results))
    assert number(run.last("result", "finetune"), "compact", "accuracy") == 0.9
    assert number(run.last("result", "dmc"), "compact", "accuracy") == 0.5
    assert number(run.last("plan"), "macs", "full") is None


def broken(run: Path, file: str, content: bytes) -> None:
    (run / file).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda run: os.remove(run / "config.yaml"), RunError, "is not a run directory"),
        (
            lambda run: broken(run, "config.yaml", b"command: train"),
            RunError,
            "is a run of 'fastprune train': a run of",
        ),
        (lambda run: broken(run, "config.yaml", b"command: prune\nmethod: [1]"), RunError, "does not name a method"),
        (lambda run: broken(run, "metrics.jsonl", b'{"a": 1}\n{"b": \n{}\n'), RunError, r"jsonl, line 2: .* no JSON"),
        (lambda run: broken(run, "metrics.jsonl", b"\xff\n"), RunError, r"jsonl, line 1: .* no JSON"),
        (lambda run: broken(run, "metrics.jsonl", b"[1]\n"), RunError, r"line 1: a JSON object is needed, got '\[1\]'"),
        (lambda run: broken(run, "metrics.jsonl", b'{"stage": "search"}\n'), RunError, "at epoch None, step None"),
        (lambda run: broken(run, "plan.json", b"[]"), PlanError, "not a pruning plan"),
    ],
)
def test_wrong_runs_are_refused(
    change: Callable[[Path], None], error: type[Exception], message: str, write_run: WriteRun
) -> None:
    run = write_run("a", LINES)
    PruningRun.read(run)
    change(run)
    with pytest.raises(error, match=message):
        PruningRun.read(run)


def test_a_run_without_log_and_plan_is_refused(write_run: WriteRun) -> None:
    with pytest.raises(RunError, match="holds nothing to report yet"):
        PruningRun.read(write_run("a", [], kept=None))
    assert PruningRun.read(write_run("b", [])).epochs == []  # a method without a search
    assert PruningRun.read(write_run("c", LINES, kept=None)).plan is None  # not finished


def test_a_metric_that_is_no_number(write_run: WriteRun) -> None:
    run = PruningRun.read(write_run("a", searched({"epoch": 0, "step": 3, "loss": "high"})))
    with pytest.raises(RunError, match="run 'a': loss of step 3 is no number: 'high'"):
        run.curve("loss")
