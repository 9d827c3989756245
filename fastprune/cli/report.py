"""``fastprune report``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from fastprune.cli.settings import ReportSettings, pick, require
from fastprune.engine import RunDirectory
from fastprune.report.log import read_runs
from fastprune.report.pictures import summary, write_report


def run_report(values: dict[str, Any], given: set[str]) -> int:
    """Draw the searches and widths of pruning runs, as a page with figures."""
    settings = pick(ReportSettings, values)
    require(run=settings.run)
    places = settings.run or ()
    runs = read_runs(places)
    if len(runs) > 1:
        require(out=settings.out)
    folder = Path(settings.out) if settings.out else RunDirectory.open(places[0]).report_path
    contents = summary(write_report(runs, folder))
    if values["json"]:
        print(json.dumps({**contents, "report": str(folder / "index.html")}))
    else:
        for name, why in contents["left_out"].items():
            print(f"not drawn: {name}. {why}")
        print(f"report: {folder / 'index.html'}")
        print(f"next: fastprune prune --from_run {shlex.quote(places[0])} --budget flops=0.8 --out RUN")
    return 0
