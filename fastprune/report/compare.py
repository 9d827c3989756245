"""Several pruning runs side by side: a table, rows for programs, and a chart of accuracy over cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from os import PathLike
from pathlib import Path
from textwrap import fill
from typing import Any

from fastprune.engine import RunDirectory
from fastprune.host import atomic
from fastprune.host.wording import text_table
from fastprune.report.log import read_runs
from fastprune.report.outcome import Outcome, outcome_of
from fastprune.report.pictures import import_plots
from fastprune.report.trade_off import chart, known_outcomes

KINDS = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class Comparison:
    """The outcomes of pruning runs, in the order that they were given.

    Args:
        outcomes: one for each run.
    """

    outcomes: tuple[Outcome, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The numbers as plain values, one dict for each run; None = not known.

        ``run``, ``method``, ``budget``; ``macs``, ``params`` and ``latency_ms`` of the compact network, and with
        ``_full`` of the full one; ``accuracy_full``, ``accuracy_pruned`` and ``accuracy_tuned`` on the test set;
        ``top5_full`` and ``top5``, the last one, of 10 classes or more; ``seconds`` of search and surgery.
        """
        return [outcome.as_row() for outcome in self.outcomes]

    def to_text(self, width: int | None = None) -> str:
        """Return the table as text. Nothing is cut: a table that is too wide becomes a list of its rows.

        Args:
            width: characters of a line; None = as many as the table needs.
        """
        headings, rows = self._table()
        table = text_table(headings, rows, left=3)
        if width is None or max(map(len, table.splitlines())) <= width:
            return table
        wide = max(map(len, headings))
        lines = []
        for row in rows:
            lines.append(fill(row[0], width, break_on_hyphens=False))
            for heading, text in zip(headings[1:], row[1:], strict=True):
                after = " " * (wide + 4)
                lines.append(fill(text, width, initial_indent=f"  {heading:{wide}}  ", subsequent_indent=after))
            lines.append("")
        return "\n".join(lines[:-1])

    def __repr__(self) -> str:
        """Return the table, 100 characters wide at most."""
        return self.to_text(100)

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        headings, rows = self._table()
        head = "".join(f"<th>{escape(text)}</th>" for text in headings)
        body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def chart(self, path: str | PathLike[str]) -> Path:
        """Draw accuracy over MACs, and over measured latency if runs know theirs; it needs matplotlib.

        Args:
            path: file to write, .svg, .png or .pdf.

        Returns:
            The file.

        Raises:
            ValueError: for another kind of file, one run, without matplotlib, or if no two runs have a test accuracy.
        """
        path = Path(path)
        if path.suffix.lower() not in KINDS:
            raise ValueError(f"chart {str(path)!r}: a name that ends with {', '.join(KINDS)} is needed")
        if len(self.outcomes) < 2:
            raise ValueError("chart: got one run; give two or more to compare")
        known = {what: known_outcomes(self.outcomes, what) for what in ("macs", "latency")}
        if len(known["macs"]) < 2:
            raise ValueError(
                "chart: two runs with a test accuracy are needed; prune with --data, so that accuracies are measured"
            )
        plots = import_plots()
        with plots.style():
            figure = plots.trade_offs(*(chart(runs, what, plots) for what, runs in known.items() if len(runs) > 1))
            kind = path.suffix.lower()[1:]
            metadata = {} if kind == "png" else {"CreationDate": None} if kind == "pdf" else {"Date": None}
            atomic.write(path, partial(figure.savefig, format=kind, metadata=metadata))
        return path

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows, without columns that no run has a value for."""
        rows = [outcome.as_texts() for outcome in self.outcomes]
        headings = [name for name in rows[0] if any(row[name] != "–" for row in rows)]
        return headings, [[row[name] for name in headings] for row in rows]


def compare(runs: Sequence[str | PathLike[str] | RunDirectory]) -> Comparison:
    """Compare pruning runs by what they cost and how accurate they are.

    Args:
        runs: directories of pruning runs; the directory of ``prune_in_steps`` stands for all of its steps.

    Returns:
        A table, with the names of the directories.

    Raises:
        ValueError: if there are no runs, or one is given twice.
        RunError, PlanError: for a directory that is no pruning run, or a broken one.
    """
    if isinstance(runs, (str, PathLike, RunDirectory)):
        runs = [runs]
    paths = [str(run.path if isinstance(run, RunDirectory) else run) for run in runs]
    if not paths:
        raise ValueError("compare: got no runs; give directories of pruning runs")
    return Comparison(tuple(map(outcome_of, read_runs(paths))))
