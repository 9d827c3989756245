"""``fastprune compare``."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from typing import Any

from fastprune.cli.settings import CompareSettings, pick
from fastprune.report.compare import compare


def run_compare(values: dict[str, Any], given: set[str]) -> int:
    """Compare pruning runs: a table, and a chart of accuracy over cost."""
    settings = pick(CompareSettings, values)
    if not settings.runs:
        raise ValueError("compare needs runs: fastprune compare runs/a runs/b")
    compared = compare(settings.runs)
    why = None
    try:
        drawn: str | None = str(compared.chart(settings.chart))
    except ValueError as error:
        if "chart" in given:
            raise
        drawn, why = None, str(error)
    if values["json"]:
        print(json.dumps({"runs": compared.rows, "chart": drawn}))
    else:
        # Into a file or a pipe the table goes whole, however wide it is.
        has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
        print(compared.to_text(shutil.get_terminal_size().columns if has_width else None))
        print(f"chart: {drawn}" if drawn else f"no {why}")
        page = " --out PAGE" if len(settings.runs) > 1 else ""
        print(f"next: fastprune report --run {' '.join(map(shlex.quote, settings.runs))}{page}")
    return 0
