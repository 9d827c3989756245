"""Runs side by side: the table at every width, rows, the chart, and the command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastprune as fp
from fastprune.cli.main import main
from fastprune.engine import RunDirectory, RunError
from fastprune.report import plots
from fastprune.report.log import read_runs
from fastprune.report.outcome import outcome_of
from fastprune.report.trade_off import chart

WriteRun = Callable[..., Path]

LONG = "a-run-with-a-very-long-name-that-fits-in-no-narrow-terminal-of-sixty-or-eighty-columns"


def records(pruned: float, tuned: float | None, ms: float | None = None) -> list[dict[str, Any]]:
    plan: dict[str, Any] = {"stage": "plan", "seconds": 2.0}
    if ms is not None:
        plan["measured_ms"] = {"full": 4.0, "planned": ms}
    lines = [plan, {"stage": "result", "method": "dmc", "baseline": {"accuracy": 0.9}, "compact": {"accuracy": pruned}}]
    if tuned is not None:
        lines.append({"stage": "result", "method": "finetune", "compact": {"accuracy": tuned}})
    return lines


@pytest.fixture
def places(write_run: WriteRun) -> list[Path]:
    return [
        write_run("half", records(0.5, 0.85, 2.0)),
        write_run(LONG, records(0.7, None, 3.0), kept=(3, 5)),
        write_run("third", records(0.2, 0.8), kept=(1, 3)),
    ]


def test_rows(places: list[Path]) -> None:
    compared = fp.compare([places[0], RunDirectory.open(places[1])])
    assert [row["run"] for row in compared.rows] == ["half", LONG]
    assert [row["accuracy_tuned"] for row in compared.rows] == [0.85, None]
    assert [row["latency_ms"] for row in compared.rows] == [2.0, 3.0]
    assert fp.compare(places[0]).rows == compared.rows[:1]
    page = compared._repr_html_()
    assert page.count("<tr>") == 3
    assert "<td>85.0 % (−5.0 points)</td>" in page


@pytest.mark.parametrize("width", [60, 80, 100, None])
def test_nothing_is_cut_at_any_width(width: int | None, places: list[Path]) -> None:
    text = fp.compare(places).to_text(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= (width or 1000)
    if width is None:
        assert len(lines) == 5  # headings, a line, three runs
    joined = "".join(text.split())
    for fact in ("half", LONG, "third", "85.0%(−5.0points)", "2.00ms(2.00×faster)", "flops=0.5"):
        assert fact in joined


def test_the_chart_has_the_runs_that_are_known(places: list[Path]) -> None:
    outcomes = [outcome_of(run) for run in read_runs(list(map(str, places)))]
    panel = chart(outcomes, "macs", plots)
    assert [(p.label, p.pruned, p.last) for p in panel.points] == [
        ("half", 0.5, 0.85), (LONG, 0.7, 0.7), ("third", 0.2, 0.8),
    ]  # fmt: skip
    assert panel.baseline == (0.001, 0.9)  # millions
    figure = plots.trade_offs(panel)
    drawn = {tuple(xy) for line in figure.axes[0].get_lines() for xy in line.get_xydata().tolist()}
    assert {(p.x, p.last) for p in panel.points} | {(p.x, p.pruned) for p in panel.points} <= drawn


def test_different_networks_have_no_common_baseline(places: list[Path]) -> None:
    outcomes = [outcome_of(run) for run in read_runs(list(map(str, places)))]
    other = outcomes[1].__class__(**{**vars(outcomes[1]), "macs": (9.0, 3.0)})
    assert chart([outcomes[0], other], "macs", plots).baseline is None


@pytest.mark.parametrize(("kind", "begin"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_files(kind: str, begin: bytes, places: list[Path], tmp_path: Path) -> None:
    compared = fp.compare(places)
    path = compared.chart(tmp_path / f"chart.{kind}")
    content = path.read_bytes()
    assert content.startswith(begin)
    compared.chart(path)
    assert path.read_bytes() == content


def test_refusals(places: list[Path], write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="compare: got no runs"):
        fp.compare([])
    with pytest.raises(RunError, match="is not a run directory"):
        fp.compare([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"a name that ends with \.svg, \.png, \.pdf is needed"):
        fp.compare(places).chart("chart.doc")
    with pytest.raises(ValueError, match="two runs with a test accuracy are needed"):
        fp.compare([places[0], write_run("without", [])]).chart("chart.svg")
    monkeypatch.delitem(sys.modules, "fastprune.report.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "half" in repr(fp.compare(places))  # the table needs no matplotlib
    with pytest.raises(ValueError, match=r"pip install 'fastprune\[report\]'"):
        fp.compare(places).chart("chart.svg")


# --- the command ------------------------------------------------------------------------------------------------------


def command(line: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(shlex.split(f"compare {line}"))
    return code, *capfd.readouterr()


def test_the_command(places: list[Path], capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    line = " ".join(map(str, places))
    end = f"\nchart: trade-off.svg\nnext: fastprune report --run {line} --out PAGE\n"
    code, out, _ = command(line, capfd)
    assert code == 0
    assert out == fp.compare(places).to_text() + end  # piped: the whole table
    assert Path("trade-off.svg").is_file()
    monkeypatch.setenv("COLUMNS", "60")
    assert command(line, capfd)[1] == fp.compare(places).to_text(60) + end
    code, out, _ = command(f"--json {line} --chart c.png", capfd)
    assert json.loads(out) == {"runs": fp.compare(places).rows, "chart": "c.png"}


def test_no_chart_is_said(write_run: WriteRun, capfd: Any) -> None:
    run = write_run("a", [])
    code, out, _ = command(str(run), capfd)
    assert code == 0
    assert "no chart: got one run; give two or more to compare" in out
    assert out.endswith(f"next: fastprune report --run {run}\n")
    assert "no chart: two runs with a test accuracy are needed" in command(f"{run} {write_run('b', [])}", capfd)[1]
    assert command(f"{run} --chart c.svg", capfd)[0] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "compare needs runs"),
        ("nowhere", "'nowhere' is not a run directory"),
        ("--chrat x", "did you mean --chart?"),
    ],
)
def test_bad_input(line: str, message: str, capfd: Any) -> None:
    code, out, err = command(line, capfd)
    assert (code, out) == (2, "")
    assert message in err
