"""Accuracy over throughput, and over costs of different full networks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastprune.report import plots
from fastprune.report.log import PruningRun
from fastprune.report.outcome import outcome_of
from fastprune.report.pictures import pictures
from fastprune.report.trade_off import chart

WriteRun = Callable[..., Path]


def timed(write_run: WriteRun, name: str, full: float, ms: float, accuracy: float, **settings: Any) -> PruningRun:
    """Write a run with times in ms of a batch of 4."""
    before = settings.pop("before", 0.9)
    records = [
        {"stage": "plan", "measured_ms": {"full": full, "planned": ms}, "measured_on": {"device": "cpu", "batch": 4}},
        {"stage": "result", "method": "gcp", "baseline": {"accuracy": before}, "compact": {"accuracy": accuracy}},
    ]
    return PruningRun.read(write_run(name, records, method="gcp", gcp={}, **settings), name)


def test_accuracy_over_throughput(write_run: WriteRun) -> None:
    runs = [timed(write_run, "a", 8.0, 4.0, 0.8, model="m"), timed(write_run, "b", 8.0, 2.0, 0.7, model="m")]
    assert outcome_of(runs[0]).throughput == (500, 1000)
    (picture,) = [picture for picture in pictures(runs, plots) if picture.name == "trade_off_throughput"]
    assert "at a batch of 4" in picture.caption
    assert picture.draw is not None
    (axes,) = picture.draw().axes
    points = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_allclose(points["gcp"].get_xydata(), [[1000, 0.8], [2000, 0.7]])
    assert points["gcp"].get_linestyle() == "None"  # a scatter
    np.testing.assert_allclose(points["full network"].get_xydata(), [[500, 0.9]])
    assert axes.get_xlabel() == "images per second"


def test_without_a_batch_there_is_no_throughput(write_run: WriteRun) -> None:
    runs = [timed(write_run, "a", 8.0, 4.0, 0.8), timed(write_run, "b", 8.0, 2.0, 0.7)]
    del runs[0].records[0]["measured_on"]["batch"]  # type: ignore[attr-defined]
    assert outcome_of(runs[0]).throughput is None
    names = {picture.name: picture.draw is not None for picture in pictures(runs, plots)}
    assert names["trade_off_latency"]
    assert "trade_off_throughput" not in names


def test_full_networks_of_other_models(write_run: WriteRun) -> None:
    runs = [
        timed(write_run, "a", 8.0, 4.0, 0.8, model="big"),
        timed(write_run, "b", 10.0, 2.0, 0.7, model="big"),
        timed(write_run, "c", 2.0, 1.0, 0.6, model="small", before=0.75),
    ]
    panel = chart(list(map(outcome_of, runs)), "throughput", plots)
    assert panel.baseline is None
    assert panel.networks == {"big": (450, 0.9), "small": (2000, 0.75)}  # the median of both
    (axes,) = plots.trade_offs(panel).axes
    diamonds = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "D"]
    assert diamonds == [[[450, 0.9]], [[2000, 0.75]]]
    assert {text.get_text() for text in axes.texts} == {"a", "b", "c", "big", "small"}
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["gcp", "full networks"]  # type: ignore[union-attr]


@pytest.mark.parametrize("width", [4.6, 6.4])
@pytest.mark.parametrize("step", [0.001, 0.03])  # of the accuracy from run to run, all at one cost
def test_labels_cover_nothing(write_run: WriteRun, width: float, step: float) -> None:
    runs = [timed(write_run, f"run-{n}", 8.0, 4, 0.8 + n * step, model="m") for n in range(5)]
    with plots.style():
        figure = plots.trade_offs(chart(list(map(outcome_of, runs)), "macs", plots))
        figure.set_size_inches(width, 3.2 if width < 5 else 4.2)
        figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert len(boxes) == 5 or (step < 0.01 and len(boxes) >= 3)  # what fits nowhere is left out
    assert not any(a.overlaps(b) for a, b in combinations(boxes.values(), 2))
    area = axes.get_window_extent()
    for box in boxes.values():
        assert area.x0 <= box.x0
        assert box.x1 <= area.x1
        assert area.y0 <= box.y0 + 2
        assert box.y1 <= area.y1 + 2
        for run in map(outcome_of, runs):
            assert run.macs is not None
            x, y = axes.transData.transform((run.macs[1] / 1e6, run.accuracy))
            assert not box.contains(x, y)
    assert max(axes.get_yticks()) <= 1.000001
