"""``--log csv``: all records in ``metrics.csv``, a column for each metric."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastprune.engine.loggers import Record, flatten
from fastprune.engine.run import RunDirectory
from fastprune.host import atomic
from fastprune.host.distributed import Distributed

PLACE = ("stage", "phase", "epoch", "step")


class CSVFile:
    """A table of all records of the run.

    It begins with what ``metrics.jsonl`` holds, from which a resumed run has cut the steps that come again. A record
    with a new metric rewrites the file, with one more column; others are appended.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.run = RunDirectory(folder, Distributed())
        self.path = folder / "metrics.csv"
        self.columns = list(PLACE)
        self.rows: list[dict[str, Any]] = []

    def log(self, record: Record) -> None:
        """Add a row."""
        # The record is in metrics.jsonl already.
        new: list[Record] = [record] if self.rows else [*self.run.metrics()] or [record]
        rows = [flatten(line) for line in new]
        names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in self.columns]
        rewrite = bool(names) or not self.rows
        self.columns += names
        self.rows += rows
        if rewrite:
            atomic.write_text(self.path, self.text(self.rows, header=True))
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(self.text(rows, header=False))

    def text(self, rows: list[dict[str, Any]], *, header: bool) -> str:
        """Return rows as CSV."""
        out = io.StringIO()
        writer = csv.DictWriter(out, self.columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def close(self) -> None:
        """Do nothing: every row is on disk."""
