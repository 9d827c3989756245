"""``fastprune evaluate``."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastprune.cli.networks import (
    build_compact,
    build_model,
    check_fit,
    count_size,
    image_shape,
    measure,
    open_run_data,
)
from fastprune.cli.runs import print_results
from fastprune.cli.settings import EvaluateSettings, NetworkSettings, pick, require
from fastprune.data import Data, load_data
from fastprune.engine import RunDirectory
from fastprune.host.distributed import Distributed


def run_evaluate(values: dict[str, Any], given: set[str]) -> int:
    """Measure the networks of a run, or a network with weights, on the test set."""
    settings = pick(EvaluateSettings, values)
    peers = Distributed.from_environment()
    if settings.run is None:
        require(model=settings.model, data=settings.data)
        data = load_data(str(settings.data), mean=settings.mean, std=settings.std)
        networks, name = {"model": build_model(settings, data)}, settings.model
    else:
        own = sorted({"model", "weights", "input"} & given)
        if own:
            raise ValueError(f"--run {settings.run} has a network of its own: leave out --{own[0]}, or --run")
        run = RunDirectory.open(settings.run, peers)
        origin = pick(NetworkSettings, run.config)
        data, name = open_run_data(origin, settings.data), origin.model
        networks = build_networks(run, origin, data)
    for network in networks.values():
        check_fit(network, name, image_shape(data))
    results = measure(networks, data, settings.device, peers)
    for key, network in networks.items():
        results[key] |= count_size(network, image_shape(data))
    print_results(results, values["json"], peers, None)
    return 0


def build_networks(run: RunDirectory, origin: NetworkSettings, data: Data) -> dict[str, nn.Module]:
    """Build the networks of a run: the one it trained, or the full and the compact one of a pruning."""
    if run.config.get("command") == "train":
        origin.weights = str(run.model_path)
        return {"model": build_model(origin, data)}
    return {"baseline": build_model(origin, data), "compact": build_compact(run, origin, data)}
