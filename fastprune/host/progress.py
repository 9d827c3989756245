"""Progress of long work on standard error: a bar on a terminal, lines in a log. Nothing here imports torch.

    with progress.begin("evaluating", total=10_000) as work:
        for batch in batches:
            ...
            work.advance(len(batch))

A bar shows name, epoch and time left first, and as many metrics as fit, two at most. A log gets one line per epoch, or
a line about every tenth of work without epochs, once it has taken some seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

PATIENCE = 3.0  # seconds that work without epochs takes before a log mentions it
MOMENT = 0.4  # seconds that such work takes before a terminal shows it
PREFERRED = ("loss", "held_out_accuracy", "accuracy")
"""Metrics that come first where there is no room for all."""


class Work:
    """Work that is counted in steps, without a display; ``begin`` returns one that fits standard error.

    Args:
        name: what is done ("evaluating").
        total: the number of steps; None = unknown.
        epochs: the number of epochs that the steps make up; None = none.
        done: steps that were done before, by an interrupted run.
    """

    def __init__(self, name: str, total: int | None = None, epochs: int | None = None, done: int = 0) -> None:
        self.name, self.total, self.epochs = name, total, epochs
        self.before = self.done = done
        self.metrics: Mapping[str, float] = {}
        self.begun = time.monotonic()

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def advance(self, steps: int = 1, metrics: Mapping[str, float] | None = None) -> None:
        """Count steps, and show the last metrics."""
        self.update(self.done + steps, self.total, metrics)

    def update(self, done: int, total: int | None, metrics: Mapping[str, float] | None = None) -> None:
        """Set the number of steps that are done, and of all."""
        self.done, self.total = done, total
        if metrics is not None:
            self.metrics = metrics

    def end_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Show that an epoch, counted from 0, has ended."""
        self.metrics = metrics

    @property
    def seconds(self) -> float:
        """Seconds since the work began, in this process."""
        return time.monotonic() - self.begun

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes if it goes on like this; None before the first step."""
        new = self.done - self.before
        if self.total is None or new <= 0:
            return None
        return self.seconds / new * max(0, self.total - self.done)

    @property
    def epoch(self) -> int:
        """The epoch that is going on, counted from 1."""
        if not (self.epochs and self.total):
            return 1
        return min(self.done * self.epochs // self.total + 1, self.epochs)


class Lines(Work):
    """Work that a log describes in lines."""

    def __enter__(self) -> Work:
        self.told = False
        self.next_at = self.before + (self.total or 0) / 10
        self.timer = threading.Timer(PATIENCE, self.tell_begin)
        self.timer.daemon = True
        if self.total is None:  # nothing will be counted: only a clock can tell that it takes long
            self.timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.timer.cancel()
        if self.told and kind is None and not self.epochs:
            write(f"{self.name}: done in {duration(self.seconds)}")

    def tell_begin(self) -> None:
        """Say that the work goes on."""
        self.told = True
        write(f"{self.name} …")

    def update(self, done: int, total: int | None, metrics: Mapping[str, float] | None = None) -> None:
        """Count, and write a line about every tenth."""
        super().update(done, total, metrics)
        if self.epochs or total is None or done < self.next_at:
            return
        self.next_at = done + total / 10
        if self.seconds >= PATIENCE and done < total:
            self.told = True
            write(", ".join([f"{self.name}: {done}/{total}", *self.times(), *metric_texts(self.metrics, 4)]))

    def end_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write the line of an epoch."""
        super().end_epoch(epoch, metrics)
        where = f"{self.name}: epoch {epoch + 1}/{self.epochs}"
        write(", ".join([where, *self.times(), *metric_texts(self.metrics, 4)]))

    def times(self) -> list[str]:
        """Return the time that has passed and the time left, as texts."""
        left = self.seconds_left
        return [duration(self.seconds), *([] if left is None else [f"ETA {duration(left)}"])]


class Bar(Work):
    """Work that a terminal shows as a bar."""

    def __enter__(self) -> Work:
        TERMINAL.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        TERMINAL.remove(self)
        if kind is None and (self.epochs or self.seconds >= PATIENCE):
            size = [f"{self.epochs} epochs"] if self.epochs else []
            TERMINAL.write(f"{self.name}: {', '.join([*size, duration(self.seconds)])}", metric_texts(self.metrics, 2))


class Terminal:
    """The live display of this process: a line for each piece of work that is going on."""

    def __init__(self) -> None:
        self.works: list[Bar] = []
        self.live: Any = None

    def add(self, work: Bar) -> None:
        """Show a piece of work."""
        self.works.append(work)
        if self.live is None:
            from rich.console import Console
            from rich.live import Live

            # Standard output is left alone: results may be piped while the bar is on the terminal.
            self.live = Live(
                console=Console(stderr=True), get_renderable=self.render, transient=True, redirect_stdout=False,
                refresh_per_second=5,
            )  # fmt: skip
            self.live.start()

    def remove(self, work: Bar) -> None:
        """Show a piece of work no longer."""
        if work in self.works:
            self.works.remove(work)
        if not self.works and self.live is not None:
            live, self.live = self.live, None
            live.stop()

    def render(self) -> Any:
        """Return what the display shows now."""
        from rich.console import Group
        from rich.text import Text

        width = self.live.console.width if self.live is not None else 80
        shown = [work for work in list(self.works) if work.epochs or work.seconds >= MOMENT]
        return Group(*(Text(row(work, width), no_wrap=True, overflow="ellipsis") for work in shown))

    def write(self, line: str, extras: Sequence[str] = ()) -> None:
        """Write a line that stays, above the display, with those extras that fit."""
        width = self.live.console.width if self.live is not None else shutil.get_terminal_size((80, 24)).columns
        for extra in extras:
            line += f", {extra}" if len(line) + len(extra) + 2 <= width else ""
        if self.live is not None:
            self.live.console.print(line, markup=False, highlight=False)
        else:
            write(line)

    def restore(self) -> None:
        """Show the cursor again; for a process that ends at once."""
        if self.live is not None:
            sys.stderr.write("\x1b[?25h\n")
            sys.stderr.flush()


TERMINAL = Terminal()
_muted = 0


def begin(
    name: str, total: int | None = None, *, epochs: int | None = None, done: int = 0, wanted: bool = True
) -> Work:
    """Return a context that shows work: a bar if standard error is a terminal, lines if not.

    Args:
        name: what is done, in one or two words.
        total: the number of steps; None = unknown.
        epochs: the number of epochs that the steps make up; None = none.
        done: steps that were done before.
        wanted: whether to show anything.
    """
    if not wanted or _muted:
        return Work(name, total, epochs, done)
    interactive = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return (Bar if interactive else Lines)(name, total, epochs, done)


@contextmanager
def muted(quiet: bool = True) -> Iterator[None]:
    """Show no work that begins in this context."""
    global _muted
    _muted += quiet
    try:
        yield
    finally:
        _muted -= quiet


def row(work: Work, width: int) -> str:
    """Return the line of a piece of work: name, epoch and time left, then bar and metrics as far as they fit."""
    parts = [work.name[:24]]
    if work.epochs:
        parts.append(f"epoch {work.epoch}/{work.epochs}")
    left = work.seconds_left
    parts.append(clock(work.seconds) if work.total is None else f"ETA {'-:--' if left is None else clock(left)}")
    texts = metric_texts(work.metrics, 2)
    bars = [] if work.total is None else [draw_bar(work.done, work.total, 8 if width >= 76 else 4)]
    for extra in [*bars, *texts]:
        if len("  ".join([*parts, extra])) <= width:
            parts.append(extra)
    return "  ".join(parts)


def draw_bar(done: int, total: int, size: int) -> str:
    """Return a bar of ``size`` characters and the percentage."""
    part = min(1.0, done / total) if total else 1.0
    full = int(part * size)
    return f"{'━' * full}{'╌' * (size - full)} {int(100 * part):3d} %"


def metric_texts(metrics: Mapping[str, float], most: int) -> list[str]:
    """Return the most telling metrics as texts, loss and accuracy first."""
    names = [name for name in PREFERRED if name in metrics]
    names += [name for name in metrics if name not in names]
    return [f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in names[:most]]


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """Return seconds in words of two units at most: 1.5 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def write(line: str) -> None:
    """Write a line on standard error, at once."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the place that prints progress
