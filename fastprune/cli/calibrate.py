"""``fastprune calibrate``."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, cast

import torch

from fastprune.calibrating import calibrate
from fastprune.cli.advice import after_calibrating, at_chance, unmeasured
from fastprune.cli.evaluate import load_networks
from fastprune.cli.inputs import check_batch, data_example, load_objective
from fastprune.cli.networks import build_code, check_classes, check_fit, measure, open_run_data
from fastprune.cli.runs import print_results
from fastprune.cli.settings import CalibrateSettings, NetworkSettings, pick, require
from fastprune.engine import RunDirectory
from fastprune.host.distributed import Distributed
from fastprune.recovery import How
from fastprune.runs import NetworkRecord, load_pruned
from fastprune.runs.uncut import is_fine_tuned
from fastprune.training.data_for_network import open_for


def run_calibrate(values: dict[str, Any], given: set[str]) -> int:
    """Compensate the weights of a run without training, into a new run."""
    settings = pick(CalibrateSettings, values)
    require(run=settings.run)
    peers = Distributed.from_environment()
    run = RunDirectory.open(settings.run, peers)
    origin = pick(NetworkSettings, run.config)
    objective = load_objective(settings, origin)
    data = open_run_data(origin, settings.data)
    record = NetworkRecord.read(run, data)
    if settings.model and record.source is not None:
        raise ValueError(f"--run {settings.run} has a network of its own: leave out --model")
    full = build_code(settings.model, data) if settings.model else None
    before = load_pruned(run, full, data=data)
    data, objective = open_for(before, data, objective)
    example = data_example(data, objective, before)
    check_fit(before, record.name, example)
    check_classes(before, data, example, objective)
    check_batch(before, data, objective, settings.device)
    out = settings.out or choose_copy(settings, peers)
    result = calibrate(
        run.path, data, cast("How", settings.how), images=settings.images, out=out, model=full,
        forward=objective.forward, seed=settings.seed, device=settings.device, memory=settings.memory,
    )  # fmt: skip
    new = RunDirectory.open(out, peers)
    networks = load_networks(new, data, peers, full)
    results = measure({"before": before, **networks}, data, settings.device, peers, objective)
    ending = {name: row for name, row in results.items() if name != "before"}
    tuned = is_fine_tuned(new.metrics())
    method = "finetune" if tuned else result.method
    new.log({"stage": "result", "method": method, "budget": result.budget, **ending})
    odd = [*at_chance(ending, data), *unmeasured(results, data)]
    print_results(
        results, values["json"], peers, new.path, [*odd, after_calibrating(settings, origin, out, tuned=tuned)]
    )
    return 0


def choose_copy(settings: CalibrateSettings, peers: Distributed) -> str:
    """Return a directory for the new run: the first of ``RUN-HOW``, ``RUN-HOW-2``, … that is free."""
    run = Path(settings.run)
    base = run if run.name not in ("", "..") else run.resolve()
    first = f"{base.name}-{settings.how}"
    number = next(n for n in count(1) if not name_copy(base, first, n).exists())
    return str(name_copy(base, first, int(peers.broadcast_(torch.tensor([number])))))


def name_copy(run: Path, first: str, number: int) -> Path:
    """Return a path beside a run."""
    return run.with_name(first if number == 1 else f"{first}-{number}")
