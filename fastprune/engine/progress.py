"""The progress bar of the loop: one line per phase, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar per phase, counting steps over all its epochs.

    Args:
        wanted: whether to show the bar, if standard error is a terminal.
    """

    def __init__(self, wanted: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (wanted and sys.stderr.isatty()),
        )
        self._steps = 1

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, phase: str, epochs: int, steps: int, epoch: int, step: int) -> None:
        """Begin a phase of ``epochs`` × ``steps``, of which ``epoch`` epochs and ``step`` steps are done."""
        self._steps = max(steps, 1)
        self._task = self._progress.add_task(
            phase, total=epochs * steps, completed=epoch * steps + step, epoch=epoch + 1, epochs=epochs, metrics=""
        )

    def update(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show how much of a phase without epochs is done."""
        self.advance(metrics, 0)
        self._progress.update(self._task, completed=done, total=total, epoch=1)

    def advance(self, metrics: Mapping[str, float], steps: int = 1) -> None:
        """Count steps and show the last metrics."""
        if self._progress.disable:
            return
        task = self._progress.tasks[-1]
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4])
        self._progress.update(
            self._task,
            advance=steps,
            metrics=shown,
            epoch=min(int(task.completed) // self._steps + 1, task.fields["epochs"]),
        )
