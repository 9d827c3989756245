"""``fastprune train``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastprune.cli.advice import after_training, at_chance
from fastprune.cli.inputs import check_batch, data_example, load_objective
from fastprune.cli.networks import (
    build_model,
    check_classes,
    check_fit,
    check_recipe,
    measure,
    open_data,
    refuse_foreign_training,
)
from fastprune.cli.runs import choose_out, make_config, print_results, read_begun_settings
from fastprune.cli.settings import TrainSettings, pick, require
from fastprune.engine import TrainConfig, choose_device, train
from fastprune.engine.loggers import split_names
from fastprune.engine.run import plain, run_directory
from fastprune.graph.export.inputs import Inputs
from fastprune.host.distributed import Distributed
from fastprune.models import source_of
from fastprune.runs import NetworkRecord


def run_train(values: dict[str, Any], given: set[str]) -> int:
    """Train a network from scratch, or from weights."""
    if values["resume"]:
        values = read_begun_settings(values, given, "train")
    peers = Distributed.from_environment()
    require(model=values["model"], data=values["data"])
    choose_out(values, "train", peers)
    settings, config = pick(TrainSettings, values), pick(TrainConfig, values)
    check_recipe(config, choose_device(settings.device))
    objective = load_objective(settings)
    data = open_data(str(settings.data), settings)
    refuse_foreign_training(data)
    torch.manual_seed(settings.seed)
    model = build_model(settings, data, settings.num_classes)
    example = data_example(data, objective, model)
    check_fit(model, settings.model, example, training=True)
    check_batch(model, data, objective, settings.device)
    check_classes(model, data, example, objective, more=True)
    file = make_config(settings, "train", plain(asdict(config)))
    with run_directory(settings.out, file, peers, resume=values["resume"]) as run:
        train(
            model,
            data,
            config,
            run=run,
            seed=settings.seed,
            device=settings.device,
            distributed=peers,
            resume=values["resume"],
            log=split_names(settings.log),
            objective=objective,
        )
        if run is not None and peers.is_main:
            inputs = Inputs.from_example(example, model).specs
            NetworkRecord(type(model).__name__, source_of(model), inputs).save(run)
    result = measure({"model": model}, data, settings.device, peers, objective)
    advice = [*at_chance(result, data, trained=True), after_training(settings)]
    print_results(result, values["json"], peers, Path(str(settings.out)), advice)
    return 0
