"""Progress on a terminal and in a log."""

from __future__ import annotations

import io
import sys

import pytest

from fastprune.host import progress

METRICS = {"open": 1.0, "accuracy": 0.98765, "loss": 0.123456, "ratio": 0.5}


@pytest.fixture
def clock(patience: None, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time, in a list, that progress sees."""
    now = [100.0]
    monkeypatch.setattr("fastprune.host.progress.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_row_fits_and_has_epoch_and_time_left(clock: list[float], width: int) -> None:
    work = progress.Work("gates", total=4000, epochs=300)
    clock[0] += 600
    work.advance(1000, METRICS)
    line = progress.row(work, width)
    assert len(line) <= width
    assert line.startswith("gates  epoch 76/300  ETA 30:00")
    assert ("loss 0.1235" in line) == (width > 40)
    assert ("accuracy 0.9877" in line) == (width == 80)
    assert "open" not in line


def test_the_time_left_counts_from_where_a_run_was_resumed(clock: list[float]) -> None:
    work = progress.Work("gates", total=100, epochs=10, done=50)
    assert work.seconds_left is None
    clock[0] += 10
    work.advance(10)
    assert work.seconds_left == 40


def test_a_line_per_epoch(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.begin("train", 4, epochs=2) as work:
        for epoch in range(2):
            for _ in range(2):
                clock[0] += 1
                work.advance()
            work.end_epoch(epoch, METRICS)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "train: epoch 1/2, 2.0 s, ETA 2.0 s, loss 0.1235, accuracy 0.9877, open 1, ratio 0.5"
    assert second.startswith("train: epoch 2/2, 4.0 s, ETA 0.0 s")


def test_a_line_about_every_tenth_of_long_work(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.begin("measuring", 1000) as work:
        for _ in range(1000):
            clock[0] += 0.1
            work.advance()
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 11
    assert lines[0] == "measuring: 100/1000, 10 s, ETA 1 min 30 s"
    assert lines[-1] == "measuring: done in 1 min 40 s"


def test_short_work_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.begin("evaluating", 10) as work:
        for _ in range(10):
            clock[0] += 0.2
            work.advance()
    with progress.begin("tracing"):
        pass
    assert capsys.readouterr().err == ""


def test_long_work_without_steps_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    with progress.begin("tracing the network") as work:
        work.timer.join(5)  # type: ignore[attr-defined]
    first, second = capsys.readouterr().err.splitlines()
    assert first == "tracing the network …"
    assert second.startswith("tracing the network: done in 0.")


def test_muted_and_unwanted_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.muted(), progress.begin("train", 1, epochs=1) as work:
        work.end_epoch(0, {})
    with progress.begin("train", 1, epochs=1, wanted=False) as work:
        work.end_epoch(0, {})
    assert capsys.readouterr().err == ""


def test_a_terminal_keeps_one_line_of_finished_phases(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with progress.begin("gates", 4, epochs=2) as outer:
        outer.advance(2, METRICS)
        with progress.begin("evaluating", 10) as inner:
            inner.advance(3)
            assert len(progress.TERMINAL.works) == 2
        outer.end_epoch(1, METRICS)
    assert progress.TERMINAL.live is None
    shown = terminal.getvalue()
    assert "gates: 2 epochs, 0.0 s, loss 0.1235, accuracy 0.9877" in shown
    assert shown.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in shown  # the cursor is back


@pytest.mark.parametrize(
    ("seconds", "text", "digits"),
    [(0.04, "0.0 s", "0:00"), (59, "59 s", "0:59"), (61, "1 min 1 s", "1:01"), (7384, "2 h 3 min", "2:03:04")],
)
def test_times(seconds: float, text: str, digits: str) -> None:
    assert (progress.duration(seconds), progress.clock(seconds)) == (text, digits)
