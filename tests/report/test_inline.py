"""Figures inside a page: text, colours of the page, nothing that reaches out of the figure."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from fastprune.report import inline, plots
from fastprune.report.log import Line


def drawn(name: str = "a") -> str:
    with plots.style():
        figure = plots.curves(
            [Line(n, f"run {n}", [1, 2], [3, 4 + n]) for n in range(9)], "epochs", "R", dashed={"budget": 3}
        )
        return inline.inline_svg(inline.shrink(figure), name, "what it shows")


def test_the_page_gives_the_colours() -> None:
    svg = drawn()
    for number in range(7):
        assert f"var(--series{number})" in svg
    assert "var(--ink)" in svg
    assert "var(--grid)" in svg
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", svg)) <= {"#ffffff"}


def test_text_is_text_and_is_named() -> None:
    root = ET.fromstring(drawn())
    texts = {element.text for element in root.iter(f"{{{inline.SVG}}}text")}
    assert {"run 0", "epochs", "R", "budget"} <= texts
    assert (root.get("role"), root.get("aria-label")) == ("img", "what it shows")
    assert root.get("width") is None
    assert not list(root.iter(f"{{{inline.SVG}}}style"))


def test_ids_of_two_figures_differ() -> None:
    one, two = (set(re.findall(r'id="([^"]+)"', drawn(name))) for name in ("a", "b"))
    assert one
    assert not one & two


@pytest.mark.parametrize("count", [60, 200])
def test_many_layers_stay_below_1200_pixels(count: int) -> None:
    figure = plots.heat_map("a", {f"layer{n}": {1: 0.5, 2: 0.25} for n in range(count)})
    assert figure.get_size_inches()[1] < 11
    _, _, width, height = map(
        float, str(ET.fromstring(inline.inline_svg(inline.shrink(figure), "a", "b")).get("viewBox")).split()
    )
    assert height / width * inline.NARROW * 72 * 1.6 < 1200
