"""Every figure of the papers that docs/reports.md names is in a report of runs that have its data, and in no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprune.graph.export.inputs import InputSpec
from fastprune.graph.plan import PruningPlan
from fastprune.report import plots
from fastprune.report.log import PruningRun
from fastprune.report.page import Picture
from fastprune.report.paper_pictures import search_pictures
from fastprune.report.pictures import pictures
from fastprune.report.proxy_ranking import Ranking

WriteRun = Callable[..., Path]

PAGE = Path(__file__).parents[2] / "docs" / "reports.md"
RANKING = [Ranking("", "loss", [1, 2, 3], [[0.5], [0.6], [0.7]])]


def documented() -> set[str]:
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {name for row in rows[1:] for name in re.findall(r"`(\w+)`", row[3])}


def write(write_run: WriteRun, name: str, without: str = "", **settings: Any) -> PruningRun:
    """Write a run of a network of three blocks; without one of the metrics of its log."""
    lines: list[dict[str, Any]] = [
        {"stage": "search", "phase": "gates", "epoch": n, "step": 10 * n + 10, "regulariser": 0.4 - n / 10,
         "flops_ratio": 0.9 - n / 10, "proxy_accuracy": 0.5 + n / 10, "randomness": 0.25, "keep/b.0.c": 1 - n / 4}
        for n in range(3)
    ]  # fmt: skip
    plan = {"stage": "plan", "search": {"gated_part": 0.9, "proxy_accuracy": 0.7},
            "measured_ms": {"full": 4.0, "planned": 2.0}, "measured_on": {"device": "cpu", "batch": 2}}  # fmt: skip
    results = [
        {"stage": "result", "method": method, "baseline": {"accuracy": 0.9}, "compact": {"accuracy": 0.6}}
        for method in (settings["method"], "finetune")
    ]
    for line in lines:
        line.pop(without, None)
    plan["search"].pop(without, None)  # type: ignore[attr-defined]
    place = write_run(name, [*lines, plan, *results], **settings)
    mask = torch.tensor([True, False] * 6)
    groups = {"b.0.c": 4, "b.1.c": 4, "b.2.c": 4}
    inputs = (InputSpec((1, 3, 8, 8), "float32"),)
    PruningPlan(mask, groups, (), inputs, (1000, 400), (100, 50)).save(place / "plan.json")
    return PruningRun.read(place, name)


def make_runs(write_run: WriteRun, without: str = "") -> list[PruningRun]:
    ddnp = {"method": "ddnp", "ddnp": {"window": 0.5, "resource": "one_sided"}}
    return [
        write(write_run, "dmc", without, method="dmc"),
        *(write(write_run, f"ddnp{n}", without, budget=f"flops=0.{n}", **ddnp) for n in (4, 5, 6)),
    ]


def names(found: list[Picture]) -> set[str]:
    return {re.sub(r"_\d+$", "", picture.name) for picture in found if picture.draw is not None}


def test_every_documented_picture_is_drawn(write_run: WriteRun) -> None:
    found = list(pictures(make_runs(write_run), plots, RANKING))
    assert len(documented()) == 12
    assert documented() <= names(found)
    with plots.style():
        for picture in found:
            if picture.draw is not None:
                picture.draw().draw_without_rendering()


@pytest.mark.parametrize(
    ("without", "absent"),
    [
        ("proxy_accuracy", {"settings", "accuracy_and_regulariser", "proxy_ranking"}),
        ("regulariser", {"accuracy_and_regulariser", "cost_term"}),
        ("flops_ratio", {"cost_term"}),
        ("gated_part", {"cost_term"}),
        ("keep/b.0.c", {"mask_edge", "keep_over_epochs"}),
        ("randomness", {"randomness"}),
    ],
)
def test_a_picture_needs_its_data(without: str, absent: set[str], write_run: WriteRun) -> None:
    assert documented() - names(list(pictures(make_runs(write_run, without), plots, RANKING))) == absent


def test_one_run_compares_nothing(write_run: WriteRun) -> None:
    found = names(list(pictures(make_runs(write_run)[:1], plots)))
    compared = {"budget_widths", "settings", "trade_off_throughput", "proxy_ranking", "proxy_ranking_of_file"}
    assert documented() - found == compared | {"mask_edge"}


def test_more_panels_than_fit_are_said(write_run: WriteRun) -> None:
    runs = [write(write_run, f"run{n}", method="dmc", seed=n) for n in range(7)]
    (picture,) = [one for one in search_pictures(runs) if one.name == "accuracy_and_regulariser"]
    assert picture.note == "The first 6 of 7 are shown."
    assert picture.draw is not None
    assert len(picture.draw().axes) == 12  # two in each panel
