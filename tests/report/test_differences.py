"""What differs between runs: labels, and curves by budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastprune.report.differences import compare_by_budget, describe_settings, name_runs
from fastprune.report.log import PruningRun

WriteRun = Callable[..., Path]


def search(*accuracies: float) -> list[dict[str, Any]]:
    return [
        {"stage": "search", "phase": "gates", "epoch": n, "step": 10 * n + 10, "proxy_accuracy": value}
        for n, value in enumerate(accuracies)
    ]


def make_runs(write_run: WriteRun) -> list[PruningRun]:
    settings = {
        "soft": {"method": "ddnp", "ddnp": {"epochs": 2, "window": 0.1}},
        "again": {"method": "ddnp", "ddnp": {"epochs": 2, "window": 0.1}, "seed": 1},
        "hard": {"method": "ddnp", "ddnp": {"epochs": 2, "window": 0.0}},
        "dp": {"method": "dp", "dp": {"epochs": 9}},
        "less": {"method": "dp", "dp": {"epochs": 9}, "budget": "flops=0.35"},
        "hardless": {"method": "ddnp", "ddnp": {"epochs": 2, "window": 0.0}, "budget": "flops=0.35"},
        "alone": {"method": "dp", "dp": {"epochs": 9}, "budget": "flops=0.2"},
    }
    accuracies = {"soft": (0.5, 0.75), "again": (0.75, 0.5)}
    return [
        PruningRun.read(write_run(name, search(*accuracies.get(name, (0.1, 0.2))), **given), name)
        for name, given in settings.items()
    ]


def test_labels_name_what_differs_within_a_method(write_run: WriteRun) -> None:
    runs = make_runs(write_run)
    assert describe_settings(runs[:4]) == ["ddnp, window=0.1", "ddnp, window=0.1", "ddnp, window=0.0", "dp"]
    assert describe_settings(runs[:2]) == ["ddnp", "ddnp"]
    assert name_runs(runs[:3]) == ["ddnp, window=0.1 · soft", "ddnp, window=0.1 · again", "ddnp, window=0.0"]
    assert name_runs([runs[3], runs[4]]) == ["dp, flops=0.5", "dp, flops=0.35"]


def test_curves_are_compared_budget_by_budget(write_run: WriteRun) -> None:
    runs = make_runs(write_run)
    first, second = compare_by_budget(runs, "proxy_accuracy")  # 0.2 has one curve
    assert (first.title, second.title) == ("budget flops=0.5", "budget flops=0.35")
    soft, hard, dp = first.lines
    assert [line.label for line in first.lines] == ["ddnp, window=0.1", "ddnp, window=0.0", "dp"]
    assert (soft.x, soft.y, soft.low, soft.high) == ([1, 2], [0.625, 0.625], [0.5, 0.5], [0.75, 0.75])
    assert (hard.y, hard.low) == ([0.1, 0.2], None)
    assert {line.label: line.number for line in second.lines} == {"dp": dp.number, "ddnp, window=0.0": hard.number}
    assert len({soft.number, hard.number, dp.number}) == 3


def test_the_same_run_twice_is_two_lines(write_run: WriteRun) -> None:
    runs = [PruningRun.read(write_run(name, search(0.1, 0.2)), name) for name in ("a", "b")]
    (panel,) = compare_by_budget(runs, "proxy_accuracy")
    assert [line.label for line in panel.lines] == ["dmc", "dmc · b"]


def test_what_was_not_logged_is_not_compared(write_run: WriteRun) -> None:
    runs = make_runs(write_run)
    assert compare_by_budget(runs, "randomness") == []
    assert compare_by_budget(runs[:2], "proxy_accuracy") == []  # two seeds of one setting
    once = PruningRun.read(write_run("once", search(0.1)), "once")
    assert [len(panel.lines) for panel in compare_by_budget([once, *runs[2:4]], "proxy_accuracy")] == [2]
