"""``fastprune report``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from fastprune.cli.settings import ReportSettings, pick, require
from fastprune.engine import RunDirectory
from fastprune.report.log import read_runs
from fastprune.report.pictures import summary, write_pictures, write_report
from fastprune.report.proxy_ranking import read_ranking


def run_report(values: dict[str, Any], given: set[str]) -> int:
    """Draw the searches and widths of pruning runs, as a page with figures."""
    settings = pick(ReportSettings, values)
    if settings.ranking and not settings.run:
        return draw_ranking(settings, as_json=bool(values["json"]))
    require(run=settings.run)
    places = settings.run or ()
    runs = read_runs(places)
    if len(runs) > 1:
        require(out=settings.out)
    ranking = read_ranking(settings.ranking) if settings.ranking else ()
    folder = Path(settings.out) if settings.out else RunDirectory.open(places[0]).report_path
    contents = summary(write_report(runs, folder, ranking))
    if values["json"]:
        print(json.dumps({**contents, "report": str(folder / "index.html")}))
    else:
        for name, why in contents["left_out"].items():
            print(f"not drawn: {name}. {why}")
        print(f"report: {folder / 'index.html'}")
        print(f"next: fastprune prune --from_run {shlex.quote(places[0])} --budget flops=0.8 --out RUN")
    return 0


def draw_ranking(settings: ReportSettings, *, as_json: bool) -> int:
    """Draw the proxies and accuracies of a file, without a page."""
    require(out=settings.out)
    folder = Path(str(settings.out))
    drawn = write_pictures([], folder, read_ranking(str(settings.ranking)))
    if as_json:
        print(json.dumps({**summary(drawn), "report": None}))
    else:
        print("\n".join(f"chart: {folder / picture.name}.png" for picture in drawn))
    return 0
