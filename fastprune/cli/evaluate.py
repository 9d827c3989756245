"""``fastprune evaluate``."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fastprune.cli.advice import after_evaluating, at_chance, unmeasured
from fastprune.cli.inputs import check_batch, data_example, load_objective
from fastprune.cli.networks import (
    build_code,
    build_model,
    check_classes,
    check_fit,
    count_size,
    lacks_builder,
    measure,
    open_data,
    open_run_data,
)
from fastprune.cli.runs import print_results
from fastprune.cli.settings import EvaluateSettings, NetworkSettings, RunSettings, pick, require
from fastprune.data import Data
from fastprune.engine import RunDirectory, RunError
from fastprune.host.distributed import Distributed
from fastprune.runs import NetworkRecord, is_training, load_baseline, load_pruned
from fastprune.training.data_for_network import open_for


def run_evaluate(values: dict[str, Any], given: set[str]) -> int:
    """Measure the networks of a run, or a network with weights, on the test set."""
    settings = pick(EvaluateSettings, values)
    peers = Distributed.from_environment()
    if settings.run is None:
        require(model=settings.model, data=settings.data)
        objective = load_objective(settings)
        data = open_data(str(settings.data), RunSettings(mean=settings.mean, std=settings.std))
        networks, name = {"model": build_model(settings, data)}, settings.model
    else:
        run = RunDirectory.open(settings.run, peers)
        needed = {"model"} if lacks_builder(run) else set()
        own = sorted({"model", "weights", "input"} & given - needed)
        if own:
            raise ValueError(f"--run {settings.run} has a network of its own: leave out --{own[0]}, or --run")
        origin = pick(NetworkSettings, run.config)
        objective = load_objective(settings, origin)
        data = open_run_data(origin, settings.data)
        full = build_code(settings.model, data) if settings.model else None
        networks, name = load_networks(run, data, peers, full), NetworkRecord.read(run, data).name
    first = next(iter(networks.values()))
    data, objective = open_for(first, data, objective)
    example = data_example(data, objective, first)
    for network in networks.values():
        check_fit(network, name, example)
        if settings.run is not None:
            check_classes(network, data, example, objective)
        check_batch(network, data, objective, settings.device)
    results = measure(networks, data, settings.device, peers, objective)
    for key, network in networks.items():
        results[key] |= count_size(network, example)
    odd = [*at_chance(results, data), *unmeasured(results, data)]
    print_results(results, values["json"], peers, None, [*odd, after_evaluating(settings)])
    return 0


def load_networks(run: RunDirectory, data: Data, peers: Distributed, full: nn.Module | None) -> dict[str, nn.Module]:
    """Return the networks of a run: the one it trained, or the full and the compact one of a pruning."""
    if is_training(run):
        return {"model": load_pruned(run, full, data=data)}
    compact = load_pruned(run, full, data=data)
    try:
        if NetworkRecord.read(run, data).classes is not None:
            raise RunError("the compact network was trained for other classes")
        return {"baseline": load_baseline(run, full, data=data), "compact": compact}
    except RunError as error:
        if peers.is_main:
            print(f"the baseline is left out: {error}", file=sys.stderr)
        return {"compact": compact}
