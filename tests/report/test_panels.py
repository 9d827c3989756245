"""The data in the figures of several panels, and how readable they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastprune.report import panels
from fastprune.report.block_widths import Widths
from fastprune.report.differences import Panel
from fastprune.report.gate_training import CostTerm, MaskEdge, Training
from fastprune.report.inline import shrink
from fastprune.report.log import Line
from fastprune.report.plots import style
from fastprune.report.proxy_ranking import Ranking


@pytest.fixture(autouse=True)
def in_style() -> Iterator[None]:
    with style():
        yield


def drawn(axes: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.get_lines()}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def compared(count: int = 2) -> Figure:
    soft = Line(0, "ddnp, window=0.1", [1, 2], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7])
    dp = Line(1, "dp", [1, 2], [0.3, 0.2])
    some = [Panel(f"budget flops=0.{n}", [soft, dp]) for n in range(count - 1)]
    return panels.compared([*some, Panel("budget flops=0.35", [dp])], "epochs", "accuracy")


def trained(count: int = 2) -> Figure:
    return panels.accuracy_and_regulariser(
        [Training(f"dmc · {n}", {1: 0.9, 2: 0.5 + n / 10}, {1: 0.4, 2: 0.1, 3: 0.05}) for n in range(count)]
    )


def terms() -> Figure:
    term = CostTerm("R", 0.5, lambda r, p: 3 * (r - p).abs(), [(0.25, 0.75), (0.125, 0.375)])
    return panels.cost_terms([term])


def edges(count: int = 2) -> Figure:
    edge = MaskEdge("ddnp · a: conv2", 4, 2.0, 2.0, [1, 0.75, 0.25, 0], [1.5, 2.5, 3.5], [0.9, 0.5, 0.1])
    return panels.mask_edges([edge] * count)


def widths(count: int = 2) -> Figure:
    kept = {"sp, relative=true": (3, [2, 5]), "dmc": (0, [1, 6])}
    return panels.widths([Widths(f"conv{n}", [4, 6], kept) for n in range(count)], "block")


def rankings(count: int = 2) -> Figure:
    label, accuracies = "accuracy with shared weights", [[0.9, 0.7], [0.5], [0.25]]
    return panels.rankings([Ranking("sp", label, [0.48125, 0.48, 0.48875], accuracies)] * count)


def test_curves_by_budget() -> None:
    figure = compared()
    first, second = figure.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("budget flops=0.0", "budget flops=0.35")
    np.testing.assert_array_equal(drawn(first)["ddnp, window=0.1"].get_xydata(), [[1, 0.5], [2, 0.6]])
    (band,) = first.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(1, 0.4), (2, 0.5), (1, 0.6), (2, 0.7)}
    assert drawn(first)["dp"].get_color() == drawn(second)["dp"].get_color()
    assert drawn(first)["dp"].get_color() != drawn(first)["ddnp, window=0.1"].get_color()
    assert first.get_ylim() == second.get_ylim()  # budgets compare
    assert legend(figure) == ["ddnp, window=0.1", "dp"]


def test_accuracy_and_regulariser() -> None:
    figure = trained()
    first, second, right, _ = figure.axes
    (accuracy,), (regulariser,) = first.get_lines(), right.get_lines()
    np.testing.assert_array_equal(accuracy.get_xydata(), [[1, 0.9], [2, 0.5]])
    np.testing.assert_array_equal(regulariser.get_xydata(), [[1, 0.4], [2, 0.1], [3, 0.05]])
    np.testing.assert_array_equal(second.get_lines()[0].get_ydata(), [0.9, 0.6])
    assert right.get_ylim()[0] == 0
    assert legend(figure) == ["held-out accuracy (left axis)", "regulariser R (right axis)"]


def test_cost_terms() -> None:
    values, slopes = terms().axes
    lines = drawn(values)
    x, y = lines["R, p = 0.5"].get_data()
    np.testing.assert_allclose(y, 3 * np.abs(x))
    np.testing.assert_allclose(lines["(r − p)² (MSE)"].get_ydata(), x**2)
    np.testing.assert_allclose(lines["|r − p| (MAE)"].get_ydata(), np.abs(x))
    (points,) = [line for line in values.get_lines() if line.get_xydata().tolist() == [[0.25, 0.75], [0.125, 0.375]]]
    assert points.get_linestyle() == "None"
    assert points.get_color() == lines["R, p = 0.5"].get_color()
    slope = drawn(slopes)["R, p = 0.5"]
    finite = ~np.isnan(slope.get_xdata())
    np.testing.assert_allclose(slope.get_ydata()[finite], 3 * np.sign(slope.get_xdata()[finite]))
    assert math.isnan(slope.get_ydata()[~finite].item())  # no line across the jump


def test_the_formula_of_a_term_that_is_the_same_around_every_target() -> None:
    term = CostTerm("log(|r − p| + 1)", 0.5, lambda r, p: torch.log((r - p).abs() + 1), [(0.0, 0.0)])
    assert "log(|r − p| + 1)" in legend(panels.cost_terms([term]))


def test_mask_edges() -> None:
    (axes,) = edges(1).axes
    lines = drawn(axes)
    np.testing.assert_array_equal(lines["mask of the search"].get_xydata(), [[1.5, 0.9], [2.5, 0.5], [3.5, 0.1]])
    values = lines["its values at the channels"]
    np.testing.assert_array_equal(values.get_xydata(), [[1, 1], [2, 0.75], [3, 0.25], [4, 0]])
    assert (values.get_marker(), values.get_linestyle()) == ("s", "None")
    steps = lines["naive binary mask"].get_xydata().tolist()
    assert steps == [[0.5, 1], [2.5, 1], [2.5, 0], [4.5, 0]]
    assert axes.get_xlabel() == "rank; C = 4, Ck = 2, γ = 2"


def test_widths() -> None:
    figure = widths()
    first, second = figure.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("conv0", "conv1")
    np.testing.assert_array_equal(drawn(first)["full network"].get_xydata(), [[1, 4], [2, 6]])
    np.testing.assert_array_equal(drawn(first)["sp, relative=true"].get_xydata(), [[1, 2], [2, 5]])
    assert drawn(first)["dmc"].get_color() == panels.look(0)[0]
    assert drawn(first)["sp, relative=true"].get_color() == panels.look(3)[0]
    assert legend(figure) == ["full network", "sp, relative=true", "dmc"]


def test_rankings() -> None:
    figure = rankings(1)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "sp: ρ = −0.50"
    *bars, points = axes.get_lines()
    np.testing.assert_allclose(points.get_xydata(), [[0.48125, 0.8], [0.48, 0.5], [0.48875, 0.25]])
    np.testing.assert_allclose(bars[0].get_xydata(), [[0.48125, 0.7], [0.48125, 0.9]])
    assert axes.get_xlabel() == "accuracy with shared\nweights"
    assert figure.legends == []
    (axes,) = panels.rankings([Ranking("", "loss", [1, 1, 1], [[0.5]] * 3)]).axes
    assert axes.get_title(loc="left") == "ρ = none"


@pytest.mark.parametrize("make", [compared, trained, terms, edges, widths, rankings])
@pytest.mark.parametrize("narrow", [False, True])
def test_nothing_overlaps(make: Any, narrow: bool) -> None:
    figure = make() if make is terms else make(6)
    if narrow:
        figure = shrink(figure)
    figure.draw_without_rendering()
    for axes in figure.axes:
        for labels, low, high in ((axes.get_xticklabels(), "x0", "x1"), (axes.get_yticklabels(), "y0", "y1")):
            boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: getattr(box, low))
            assert all(getattr(a, high) <= getattr(b, low) for a, b in pairwise(boxes))
    width, height = figure.canvas.get_width_height()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [one.get_window_extent() for one in figure.legends]
    for box in boxes:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
    for one in figure.legends:
        top = one.get_window_extent().y1
        assert all(axes.get_tightbbox().y0 >= top - 1 for axes in figure.axes)
