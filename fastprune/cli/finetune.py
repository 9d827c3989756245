"""``fastprune finetune``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import yaml

from fastprune.cli.advice import at_chance, word
from fastprune.cli.inputs import check_batch, data_example, load_objective
from fastprune.cli.networks import (
    build_code,
    check_classes,
    check_fit,
    check_recipe,
    count_data_classes,
    measure,
    open_run_data,
    refuse_foreign_training,
)
from fastprune.cli.runs import (
    FINETUNE_CONFIG,
    make_config,
    print_results,
    read_fine_tuning,
    read_yaml,
    refuse_beside_resume,
)
from fastprune.cli.settings import FinetuneConfig, FinetuneSettings, NetworkSettings, pick, require
from fastprune.cli.teacher import load_teacher, locate, require_use
from fastprune.engine import RunDirectory, choose_device, prepare_teacher, train
from fastprune.engine.loggers import OpenLoggers, split_names
from fastprune.engine.run import plain, took_steps
from fastprune.graph.plan import PruningPlan
from fastprune.host import atomic
from fastprune.host.distributed import Distributed
from fastprune.runs import NetworkRecord, load_pruned


def run_finetune(values: dict[str, Any], given: set[str]) -> int:
    """Train the compact network of a run; its weights replace the run's at the end."""
    settings = pick(FinetuneSettings, values)
    require(run=settings.run)
    peers = Distributed.from_environment()
    run = RunDirectory.open(settings.run, peers)
    settings, config = choose_settings(run, settings, values, given)
    check_recipe(config, choose_device(settings.device))
    origin = pick(NetworkSettings, run.config)
    objective = load_objective(settings, origin)
    loggers = OpenLoggers(split_names(settings.log))
    data = open_run_data(origin, settings.data)
    refuse_foreign_training(data, settings.run)
    torch.manual_seed(settings.seed)
    if not run.plan_path.is_file():
        raise ValueError(f"{str(run.path)!r} holds no plan: it is no finished pruning run")
    record = NetworkRecord.read(run, data)
    if settings.model and record.source is not None:
        raise ValueError(f"--run {settings.run} has a network of its own: leave out --model")
    known = record.source is not None and config.from_scratch
    full = build_code(settings.model, data) if settings.model else None
    if settings.num_classes and record.source is None:
        raise ValueError(
            f"--num_classes: nothing says what builds the network of {settings.run}, so its classifier is not known; "
            "replace it in Python (fastprune.load, then fastprune.finetune)"
        )
    classes = settings.num_classes or (count_data_classes(data) if known else None)
    compact = load_pruned(
        run, full, data=data, trained=not config.from_scratch, classes=classes, new_head=bool(settings.num_classes)
    )
    example = data_example(data, objective, compact)
    check_fit(compact, record.name, example, training=True)
    check_classes(compact, data, example, objective)
    check_batch(compact, data, objective, settings.device)
    teacher = load_teacher(config.teacher, run, full, data)
    distillation = None if teacher is None else prepare_teacher(
        teacher, compact, data, config, device=choose_device(settings.device), objective=objective,
        plan=PruningPlan.load(run.plan_path),
    )  # fmt: skip
    recipe = recipe_on_disk(run, make_config(settings, "finetune", plain(asdict(config))), resume=values["resume"])
    with loggers:
        with recipe:
            train(
                compact, data, config, run=run, seed=settings.seed, device=settings.device, distributed=peers,
                resume=values["resume"], stage="finetune", log=loggers.makers, objective=objective,
                distillation=distillation, ema=config.ema,
            )  # fmt: skip
        if classes is not None and peers.is_main and run.network_path.is_file():
            record.with_classes(classes).save(run)
        result = measure({"compact": compact}, data, settings.device, peers, objective)
        line = {"stage": "result", "method": "finetune", **result}
        run.log(line)
        loggers.log(line)
    odd = at_chance(result, data)
    print_results(result, values["json"], peers, run.path, [*odd, f"next: fastprune report --run {word(settings.run)}"])
    return 0


def choose_settings(
    run: RunDirectory, settings: FinetuneSettings, values: dict[str, Any], given: set[str]
) -> tuple[FinetuneSettings, FinetuneConfig]:
    """Return the settings and the recipe: as given and as the run's own recipe says, or those of a resumed one."""
    config = pick(FinetuneConfig, {**values, **read_fine_tuning(run, given)})
    if not values["resume"]:
        require_use(config.teacher, given)
        return settings, replace(config, teacher=locate(config.teacher))
    file = run.path / FINETUNE_CONFIG
    refuse_beside_resume(given, "run", file)
    begun = read_yaml(file)
    anew = {name: values[name] for name in ("run", *({"device"} & given))}
    return pick(FinetuneSettings, {**begun, **anew}), pick(FinetuneConfig, begun)


@contextmanager
def recipe_on_disk(run: RunDirectory, file: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """Write the recipe for ``--resume``; remove it if an error comes before the first step."""
    if not run.distributed.is_main or resume:
        yield
        return
    recipe, checkpoints = run.path / FINETUNE_CONFIG, run.checkpoints_path("finetune")
    # An earlier fine-tuning's checkpoints must not outlive its recipe: a resumed run would take up the wrong one.
    shutil.rmtree(checkpoints, ignore_errors=True)
    atomic.write_text(recipe, yaml.safe_dump(file))
    try:
        yield
    except Exception:
        if not took_steps(run, "finetune"):
            recipe.unlink()
            shutil.rmtree(checkpoints, ignore_errors=True)
        raise
