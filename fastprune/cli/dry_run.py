"""``fastprune prune --dry-run``: what a pruning would do; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from fastprune.cli.settings import PruneSettings
from fastprune.engine import Placement, choose_device
from fastprune.host.distributed import Distributed
from fastprune.host.progress import duration
from fastprune.job import Job, RunOptions, Tracing, make_worker
from fastprune.methods.contract import Method
from fastprune.planning.budget import Budget, Conditions
from fastprune.planning.goal import Goal
from fastprune.planning.limits import Limits
from fastprune.preview import Preview, preview
from fastprune.report.tables import millions, percent, show


def dry_run(
    settings: PruneSettings,
    subject: Any,
    method: type[Method],
    options: Mapping[str, Any],
    limits: Limits,
    conditions: Conditions,
    peers: Distributed,
    *,
    as_json: bool,
) -> int:
    """Trace the network, time a few steps of the search, and print what the pruning would do."""
    device = choose_device(settings.device)
    placement = Placement(device, settings.precision, settings.channels_last)
    goal = Goal.make(settings.budget, conditions, limits, device)
    tracing = Tracing(
        not settings.keep_class, settings.ignore, not settings.inexact, settings.replace_norms, settings.heads
    )
    running = RunOptions(placement, settings.seed, None, None, False, {})
    job = Job(make_worker(method, options, subject.data), goal, tracing, running, peers, subject.objective)
    network, inputs, source = job.prepare(subject.model, subject.example, subject.data)
    task = job.trace(network, inputs, source)
    found = preview(job.worker, task, source, placement)
    if as_json:
        print(json.dumps(as_values(found)))
    else:
        print_preview(settings, goal.budget, found)
    return 0


def as_values(found: Preview) -> dict[str, Any]:
    """Return a preview as JSON values."""
    groups = [
        {"group": g.group.name, "units": g.group.size, "prunable": g.prunable, "kept": g.kept, "least": g.least}
        for g in found.groups
    ]
    return {**{name: value for name, value in asdict(found).items() if name != "groups"}, "groups": groups}


def print_preview(settings: PruneSettings, budget: Budget, found: Preview) -> None:
    """Print a preview: groups, cost, what limits it, time."""
    table = Table()
    table.add_column("group", overflow="fold")
    for heading in ("units", "stay at an equal ratio", "least"):
        table.add_column(heading, justify="right")
    for g in found.groups:
        stays = "all" if not g.prunable else f"{g.kept} ({percent(g.kept / g.group.size)})"
        table.add_row(g.group.name, f"{g.group.size:,}", stays, f"{g.least:,}")
    show(table)
    console = Console(markup=False, highlight=False)
    fixed = [g.group.name for g in found.groups if not g.prunable]
    parts = [
        f"cost: {budget} allows {amount(found.limit, budget)} of {amount(found.full, budget)}; "
        f"an equal ratio takes {amount(found.planned, budget)} ({percent(found.planned / found.full)})",
        f"limit: {percent(found.least / found.full)} of the full cost remain with every prunable channel gone"
        + (", most of it in " + ", ".join(f"{n} ({percent(p)})" for n, p in found.largest) if found.largest else ""),
        *(
            [f"{settings.method} leaves {len(fixed)} of {len(found.groups)} groups alone: {', '.join(fixed)}"]
            if fixed
            else []
        ),
        "time: " + (f"about {duration(found.seconds)}: " if found.seconds is not None else "") + found.how,
        *(
            [f"then: compensation on {settings.calibration} images, which this time does not include"]
            if settings.data and settings.compensate != "none"
            else []
        ),
        "nothing was written; the method chooses widths of its own, an equal ratio is an example of the budget",
        "next: the same command without --dry-run",
    ]
    for part in parts:
        console.print(part)


def amount(cost: float, budget: Budget) -> str:
    """Return a cost with its unit."""
    if budget.is_time:
        return f"{cost:.3f} ms"
    return f"{millions(cost)} {'parameters' if budget.resource == 'params' else 'MACs'}"
