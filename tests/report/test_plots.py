"""The report: the data in its figures, its files, its page, and the command."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from fastprune.cli.main import main
from fastprune.report import plots
from fastprune.report.log import Line, PruningRun, read_runs
from fastprune.report.page import Picture, page
from fastprune.report.pictures import write_report

WriteRun = Callable[..., Path]

SEARCH = [
    {"stage": "search", "phase": "gates", "epoch": n, "step": 10 * n + 10, "regulariser": 0.4 - n / 10,
     "flops_ratio": 0.9 - n / 10, "proxy_accuracy": 0.5 + n / 10, "alignment_gap": 0.3 - n / 10,
     "keep/conv1": 1 - n / 4, "keep/conv2": 0.5}
    for n in range(3)
]  # fmt: skip
RANDOMNESS = [{**line, "randomness": 0.25} for line in SEARCH]
RESULTS = [
    {"stage": "plan", "seconds": 12.3},
    {"stage": "result", "method": "dmc", "baseline": {"accuracy": 0.9}, "compact": {"accuracy": 0.625}},
    {"stage": "result", "method": "finetune", "compact": {"accuracy": 0.875}},
]


class Page(HTMLParser):
    """The files that a page refers to, its tags and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.files: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.in_row = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.files += [value for name, value in attrs if name in ("src", "href") and value]
        if tag == "tr":
            self.in_row = True
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        self.in_row = self.in_row and tag != "tr"

    def handle_data(self, data: str) -> None:
        if self.in_row and data.strip():
            self.rows[-1].append(data)


def test_curves() -> None:
    lines = [Line(0, "a", [1, 2], [0.5, 0.25]), Line(8, "b", [1, 2], [0.3, 0.2], [0.1, 0.1], [0.4, 0.5])]
    figure = plots.curves(lines, "epochs", "R", dashed={"budget flops=0.5": 0.5})
    (axes,) = figure.axes
    drawn = {line.get_label(): line for line in axes.get_lines()}
    assert drawn.keys() == {"a", "b", "budget flops=0.5"}
    np.testing.assert_array_equal(drawn["a"].get_xydata(), [[1, 0.5], [2, 0.25]])
    np.testing.assert_array_equal(drawn["budget flops=0.5"].get_ydata(), [0.5, 0.5])
    assert (drawn["a"].get_color(), drawn["b"].get_color()) == (plots.COLOURS[0], plots.COLOURS[1])
    assert drawn["a"].get_linestyle() != drawn["b"].get_linestyle()  # the ninth run: the second round of colours
    (band,) = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(1, 0.1), (2, 0.1), (1, 0.4), (2, 0.5)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epochs", "R")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "budget flops=0.5"]


def test_heat_map() -> None:
    figure = plots.heat_map("dmc · a", {"conv1": {1: 1.0, 2: 0.5, 3: 0.25}, "conv2": {1: 0.0, 3: 1.0}})
    axes, _ = figure.axes
    (image,) = axes.get_images()
    assert image.get_array().tolist() == [[1.0, 0.5, 0.25], [0.0, None, 1.0]]
    assert image.get_extent() == [0.5, 3.5, 1.5, -0.5]  # each epoch in the middle of its column, the first layer on top
    assert image.get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "conv2"]


def test_widths() -> None:
    figure = plots.widths({"conv1": 4, "conv2": 6}, {"a": [2, 6], "b": [1, 3]}, [0, 2])
    (axes,) = figure.axes
    behind, first, second = axes.containers
    assert [bar.get_width() for bar in behind] == [4, 6]
    assert [bar.get_width() for bar in first] == [2, 6]
    assert [bar.get_width() for bar in second] == [1, 3]
    # Side by side, inside the bar of all channels, in the colours of these runs' curves.
    for all_channels, upper, lower in zip(behind, first, second, strict=True):
        edges = [upper.get_y(), upper.get_y() + upper.get_height(), lower.get_y(), lower.get_y() + lower.get_height()]
        assert edges == sorted(edges)
        assert all_channels.get_y() < edges[0] < edges[-1] < all_channels.get_y() + all_channels.get_height()
    legend = {text.get_text(): patch for text, patch in zip(
        figure.legends[0].get_texts(), figure.legends[0].get_patches(), strict=True)}  # fmt: skip
    assert legend["b"].get_facecolor() == second[0].get_facecolor() != legend["a"].get_facecolor()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1 (4)", "conv2 (6)"]


@pytest.mark.parametrize("count", [1, 60])
def test_layer_names_do_not_overlap(count: int) -> None:
    names = [f"layer{n}.0.conv1" for n in range(count)]
    for figure in (
        plots.widths(dict.fromkeys(names, 16), {"a": [8] * count}, [0]),
        plots.heat_map("a", {name: {1: 0.5, 2: 0.25} for name in names}),
    ):
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert len(boxes) == count
        assert min(box.x0 for box in boxes) >= 0
        assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))


def test_numbers_at_bars_do_not_overlap() -> None:
    figure = plots.widths({"conv1": 16, "conv2": 16}, {f"run {n}": [8, 8] for n in range(5)}, range(5))
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 10
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))


def test_a_report_of_several_runs(write_run: WriteRun, tmp_path: Path) -> None:
    runs = read_runs(
        [
            str(write_run("one", RANDOMNESS + RESULTS)),
            str(write_run("two", SEARCH, kept=None, method="ddnp", ddnp={"epochs": 5, "window": 0.1})),
            str(write_run("l1", [], method="l1", model="<resnet>")),
        ]
    )
    pictures = {picture.name: picture for picture in write_report(runs, tmp_path / "new" / "out")}
    left_out = {name: picture.note for name, picture in pictures.items() if picture.draw is None}
    assert left_out == {
        "trade_off_macs": "Left out: two, l1 (MACs or accuracy not measured).",
        "trade_off_latency": "Left out: one, two, l1 (measured latency or accuracy not measured).",
        "keep_over_epochs_3": "Left out: l1 · l1 (logged no widths).",
    }
    assert pictures["randomness"].note == "Left out: ddnp · two, l1 · l1 (logged no such metric)."
    assert pictures["widths"].note == "Left out: ddnp · two (has no plan yet)."

    drawn = {name: picture.draw() for name, picture in pictures.items() if picture.draw is not None}
    proxy = drawn["proxy_accuracy"].axes[0].get_lines()
    assert [line.get_label() for line in proxy] == ["dmc · one", "ddnp · two"]
    np.testing.assert_allclose(proxy[0].get_xydata(), [[1, 0.5], [2, 0.6], [3, 0.7]])
    ratio = drawn["resource_ratio"].axes[0].get_lines()
    assert [line.get_label() for line in ratio] == ["dmc · one", "ddnp · two", "budget flops=0.5"]
    np.testing.assert_allclose(drawn["randomness"].axes[0].get_lines()[0].get_xdata(), [10, 20, 30])
    assert drawn["randomness"].axes[0].get_xlabel() == "steps of the search"
    np.testing.assert_allclose(drawn["regulariser"].axes[0].get_lines()[1].get_ydata(), [0.4, 0.3, 0.2])
    np.testing.assert_allclose(drawn["alignment_gap"].axes[0].get_lines()[0].get_ydata(), [0.3, 0.2, 0.1])

    files = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert files == {"index.html"} | {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    for name in drawn:
        assert (tmp_path / "new" / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in (tmp_path / "new" / "out" / f"{name}.svg").read_bytes()

    text = (tmp_path / "new" / "out" / "index.html").read_text()
    found = Page(text)
    assert found.files == ["data:,"]  # the page is complete: nothing from the network, no other file
    assert "script" not in found.tags
    assert found.tags.count("svg") == len(drawn) - 1  # the page's widths are bars of its own
    rows = [[cell.replace("\u00a0", " ") for cell in row] for row in found.rows if row]
    table = {row[0]: row for row in rows}
    head = ["run", "method", "budget", "MACs", "parameters", "accuracy before", "pruned", "fine-tuned", "time"]
    assert table["run"] == head
    assert table["one"] == ["one", "dmc", "flops=0.5", "400 (40.0 %)", "50 (50.0 %)", "90.0 %", "62.5 %",
                            "87.5 % (−2.5 points)", "12 s"]  # fmt: skip
    assert table["l1"][5:] == ["–", "–", "–", "–"]
    assert ["model", "<resnet>"] in rows
    assert ["dmc.epochs", "2"] in rows
    assert ["ddnp.epochs", "5"] in rows
    assert "keep_over_epochs_3</code>: Left out: l1 · l1" in text


def test_networks_of_other_layers_have_widths_of_their_own(write_run: WriteRun, tmp_path: Path) -> None:
    one, two, other = (PruningRun.read(write_run(name, [])) for name in ("one", "two", "other"))
    assert other.plan is not None
    other.plan.groups["conv1"], other.plan.groups["conv2"] = 5, 5  # type: ignore[index]
    pictures = {p.name: p for p in write_report([one, other, two], tmp_path / "out") if p.draw is not None}
    assert pictures.keys() == {"widths_1", "widths_2"}
    legends = [[t.get_text() for t in p.draw().legends[0].get_texts()[1:]] for p in pictures.values()]  # type: ignore[misc]
    assert legends == [["dmc · one", "dmc · two"], ["dmc · other"]]


def test_the_same_figure_is_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        with plots.style():
            figure = plots.curves([Line(0, "a $^$ folder", [1, 2], [3, 4])], "epochs", "R")  # no formula
            plots.save(figure, tmp_path, "curve")
        contents.append([(tmp_path / f"curve.{kind}").read_bytes() for kind in ("png", "svg")])
    assert contents[0] == contents[1]


def test_a_users_own_style_changes_nothing() -> None:
    with mpl.rc_context({"axes.facecolor": "black", "figure.dpi": 20}), plots.style():
        figure = plots.curves([Line(0, "a", [1, 2], [3, 4])], "epochs", "R")
    assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)
    assert figure.dpi == 150


def test_names_are_escaped(write_run: WriteRun) -> None:
    run = PruningRun.read(write_run("a", SEARCH, data="<img src=x>", dmc={"<b>": "&"}), "<script>")
    figure = plots.curves([Line(0, "<script>", [1, 2], [3, 4])], "<script>", "R")
    found = Page(page([run], [Picture("curve", 'of "a" & <script>', lambda: figure, "<script>")]))
    assert not {"script", "img"} & set(found.tags)
    assert ["dmc.<b>", "&"] in found.rows


# --- the command ------------------------------------------------------------------------------------------------------


def report(line: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(shlex.split(f"report {line}"))
    return code, *capfd.readouterr()


def test_the_report_of_a_real_search(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    data = "--model resnet20 --data synthetic:3x8x8:4:64 --budget flops=0.6 --device cpu"
    options = "--dmc.epochs 2 --dmc.samples 16 --dmc.batch_size 8 --dmc.evaluate_every 1"
    assert main(shlex.split(f"prune {data} --method dmc {options} --out {run}")) == 0
    capfd.readouterr()
    code, out, _ = report(f"--run {run} --json", capfd)
    assert code == 0
    names = ["proxy_accuracy", "regulariser", "resource_ratio", "randomness", "accuracy_and_regulariser", "cost_term"]
    names += ["keep_over_epochs", "widths", "block_widths"]
    told = json.loads(out)
    assert told == {"figures": names, "left_out": {}, "report": str(run / "report" / "index.html")}
    assert {path.stem for path in (run / "report").glob("*.png")} == set(names)
    read = PruningRun.read(run)
    assert read.plan is not None
    assert read.kept.keys() == read.plan.groups.keys() - {"conv1"}  # DMC's gates are inside blocks
    assert all(list(curve) == [1, 2] for curve in read.kept.values())
    assert len(read.curve("proxy_accuracy")) == 2
    assert not any("keep/" in name for name in read.last("plan")["search"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--run is needed"),
        ("--run nowhere", "'nowhere' is not a run directory"),
        ("--run trained", "'trained' is a run of 'fastprune train': a run of 'prune' is needed"),
        ("--run good good2", "--out is needed"),
        ("--run good --run good2", "--out is needed"),
        ("--run good good --out new", "--run good: this run is given twice"),
        ("--run good --out file", "file: File exists"),
        ("--run cut", r"metrics.jsonl, line 1: this is no JSON"),
        ("--run text --out new", "run 'text': regulariser of step 1 is no number"),
        ("--run nothing", "'nothing' holds nothing to report yet"),
    ],
)
def test_bad_input(line: str, message: str, write_run: WriteRun, tmp_path: Path, capfd: Any) -> None:
    write_run("good", SEARCH)
    write_run("good2", SEARCH)
    write_run("trained", [], command="train")
    write_run("nothing", [], kept=None)
    write_run("text", [{"stage": "search", "phase": "gates", "epoch": 0, "step": 1, "regulariser": "x"}])
    (write_run("cut", []) / "metrics.jsonl").write_text('{"stage": \n')
    (tmp_path / "file").write_text("")
    before = set(tmp_path.rglob("*"))
    code, out, err = report(line, capfd)
    assert (code, out) == (2, "")
    assert err.startswith("fastprune: error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert set(tmp_path.rglob("*")) == before


def test_without_matplotlib(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    run = write_run("good", SEARCH)
    monkeypatch.delitem(sys.modules, "fastprune.report.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = report(f"--run {run}", capfd)
    assert code == 2
    assert "a report needs matplotlib: pip install 'fastprune[report]'" in err
    assert not (run / "report").exists()


def test_a_run_without_a_search(write_run: WriteRun, capfd: Any) -> None:
    run = write_run("l1", [], method="l1")
    code, out, _ = report(f"--run {run}", capfd)
    assert code == 0
    assert "not drawn: proxy_accuracy. Left out: l1 · l1 (logged no such metric)." in out
    assert {path.name for path in (run / "report").iterdir()} == {"index.html", "widths.png", "widths.svg"}
