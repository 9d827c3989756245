"""Figures as SVG inside a page: text stays text, and colours follow the page's light or dark scheme."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree as ET

import matplotlib as mpl
from matplotlib.figure import Figure

from fastprune.report import plots

SVG = "http://www.w3.org/2000/svg"
LINK = "http://www.w3.org/1999/xlink"

VARIABLES = {
    plots.INK: "ink",
    plots.GRID: "grid",
    plots.GREY: "outline",
    **{colour: f"series{number}" for number, colour in enumerate(plots.COLOURS)},
}
"""{colour in a figure: CSS variable of the page}."""

NARROW = 4.6
"""Inches of a figure on the page; an inch is at least 80 pixels there."""

COLOUR = re.compile("|".join(VARIABLES), re.IGNORECASE)


def inline_svg(figure: Figure, name: str, text: str) -> str:
    """Return a figure as an ``<svg>`` element for a page.

    Args:
        figure: the figure, drawn in the style of ``plots``.
        name: a name that no other figure of the page has.
        text: what it shows, for people who do not see it.
    """
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", LINK)
    root = ET.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):  # a style would hold for the whole page
                parent.remove(child)
    _drop_unused_ids(root)
    for element in root.iter():
        style = element.get("style")
        if style is not None:
            element.set("style", _restyle(style))
    width = float(str(root.get("width")).removesuffix("pt"))
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", text)
    root.set("style", f"stroke-linejoin:round;stroke-linecap:butt;max-width:{width * 1.6:.0f}px")
    return ET.tostring(root, encoding="unicode")


def _restyle(style: str) -> str:
    """Return a style with the page's colours and fonts."""
    style = COLOUR.sub(lambda found: f"var(--{_VARIABLE[found[0].lower()]})", style)
    return re.sub(r"(font:[^;]*?px )[^;]*", r"\1system-ui, sans-serif", style)


def _drop_unused_ids(root: ET.Element) -> None:
    """Remove the ids that nothing refers to; matplotlib numbers them alike in every figure."""
    used = set(re.findall(r"#([\w-]+)", " ".join(value for e in root.iter() for value in e.attrib.values())))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


_VARIABLE = {colour.lower(): variable for colour, variable in VARIABLES.items()}


def shrink(figure: Figure) -> Figure:
    """Make a figure narrow enough that its text is readable on a page of 400 pixels; return it."""
    width, height = figure.get_size_inches()
    if width > NARROW:
        rows = 0
        for legend in figure.legends:
            texts = [text.get_text() for text in legend.get_texts()]
            columns = 2 if max(map(len, texts), default=0) <= 20 else 1
            rows += -(-len(texts) // columns)
            legend.set_ncols(columns)
        # High figures are heat maps, with a row for each layer; with its caption none is higher than 1,200 pixels.
        figure.set_size_inches(NARROW, min(height, 9.2) if height > 5 else 2.9 + 0.16 * rows)
    return figure
