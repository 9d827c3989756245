"""``fastprune prune``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastprune.cli.advice import after_pruning, at_chance, tell_compensation, warn_of_random_weights
from fastprune.cli.dry_run import dry_run
from fastprune.cli.inputs import check_batch, find_example, load_objective
from fastprune.cli.networks import build_model, check_classes, check_fit, measure, open_data
from fastprune.cli.recipes import read_recipe
from fastprune.cli.runs import (
    FINETUNE_CONFIG,
    choose_out,
    inherit_settings,
    make_config,
    print_results,
    read_begun_settings,
)
from fastprune.cli.settings import PruneSettings, pick, require
from fastprune.data import Data
from fastprune.engine import RunDirectory
from fastprune.engine.loggers import OpenLoggers, split_names
from fastprune.graph.export.inputs import Example
from fastprune.graph.plan import PruningPlan
from fastprune.host.distributed import Distributed
from fastprune.methods import registry
from fastprune.methods.contract import Method
from fastprune.models import source_of
from fastprune.models.ultralytics import is_ultralytics
from fastprune.planning.budget import Budget, Conditions
from fastprune.planning.limits import Limits
from fastprune.pruning import PruningResult, prune
from fastprune.recovery import Choice
from fastprune.report.graph_tables import print_difference
from fastprune.runs import Origin, load_pruned
from fastprune.training.data_for_network import open_for
from fastprune.training.objective import Objective


def run_prune(values: dict[str, Any], given: set[str]) -> int:
    """Prune a trained network."""
    if values["resume"]:
        values = read_search_settings(values, given)
    peers = Distributed.from_environment()
    require(model=values.get("model") or values.get("from_run"))
    choose_out(values, values["method"], peers)
    settings = pick(PruneSettings, inherit_settings(values, given))
    settings.keep_class |= is_ultralytics(settings.model)  # whose class is what users go on with
    require(model=settings.model, **({} if settings.dry_run else {"out": settings.out}))
    method = registry.load(settings.method)
    options = method_options(method, values.get(settings.method))
    if method.needs_data and not settings.data:
        raise ValueError(f"--data is needed: method {settings.method!r} searches on training data")
    if settings.compensate not in ("auto", "none") and not settings.data:
        raise ValueError(f"--data is needed: --compensate {settings.compensate} fits layers on its images")
    Budget.parse(settings.budget)
    loggers = OpenLoggers(split_names(settings.log))
    limits, conditions = make_limits(settings), make_conditions(settings)
    recipe = None if settings.recipe is None or values["resume"] else read_recipe(settings.recipe)
    subject = load_subject(settings, peers)
    if settings.dry_run:
        return dry_run(settings, subject, method, options, limits, conditions, peers, as_json=values["json"])
    warn_of_random_weights(settings, peers)
    sections = {} if recipe is None else recipe.sections
    with loggers:
        result = search(settings, subject, method, options, loggers, sections, resume=values["resume"])
        tell(settings, subject, result, peers, loggers, as_json=values["json"])
    return 0


def search(
    settings: PruneSettings,
    subject: Subject,
    method: type[Method],
    options: Mapping[str, Any],
    loggers: OpenLoggers,
    sections: Mapping[str, Any],
    *,
    resume: bool,
) -> PruningResult:
    """Prune the network; ``config.yaml`` keeps the sections of a recipe."""
    return prune(
        subject.model,
        subject.example,
        method=method,
        budget=settings.budget,
        data=subject.data,
        loss=subject.objective.loss,
        forward=subject.objective.forward,
        out=settings.out,
        resume=resume,
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
        channels_last=settings.channels_last,
        rewrite=not settings.keep_class,
        ignore=settings.ignore,
        limits=make_limits(settings),
        conditions=make_conditions(settings),
        after=subject.before,
        exact=not settings.inexact,
        replace_norms=settings.replace_norms,
        heads=settings.heads,
        compensate=cast("Choice", settings.compensate),
        calibration=settings.calibration,
        run_config=make_config(settings, "prune", sections),
        origin=subject.origin,
        log=loggers.makers,
        **options,
    )


def read_search_settings(values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Return the settings of a search that is resumed; refuse one whose network has been fine-tuned since."""
    values = {"compensate": "none", **read_begun_settings(values, given, "prune")}  # runs of earlier versions lack it
    if "calibrate" in values:
        raise ValueError(
            f"{values['out']!r} was made by fastprune calibrate: give the run that it came from, "
            f"{str(values['calibrate']['run'])!r}"
        )
    if (Path(values["out"]) / FINETUNE_CONFIG).exists():
        raise ValueError(
            f"{values['out']!r} is pruned, and its weights have been fine-tuned since: "
            f"go on with fastprune finetune --run {values['out']} --resume"
        )
    return values


def method_options(method: type[Method], values: Any) -> dict[str, Any]:
    """Return the options of a method as a command line or a file has them, checked."""
    if not isinstance(values or {}, Mapping):
        raise ValueError(f"{method.name}: its options are needed by name, got {values!r}")
    options = dict(values or {})
    try:
        registry.configure(method, options)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return options


def make_limits(settings: PruneSettings) -> Limits:
    """Return the limits of the widths."""
    return Limits.parse(settings.keep_ratio, min_keep=settings.min_keep, round_to=settings.round_to)


def make_conditions(settings: PruneSettings) -> Conditions:
    """Return the conditions under which a latency counts."""
    dtype: Any = settings.latency_dtype
    return Conditions(
        settings.latency_device, settings.latency_batch, dtype, settings.latency_channels_last,
        settings.latency_modelled,
    )  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A network that is to be pruned.

    Args:
        model: the network.
        example: a batch of its inputs.
        data: the data set; None if there is none.
        objective: how the network runs on a batch, and its loss.
        before: the plan that the network was pruned by already; None for a full one.
        origin: what the full network can be built from again.
    """

    model: nn.Module
    example: Example
    data: Data | None
    objective: Objective
    before: PruningPlan | None
    origin: Origin


def load_subject(settings: PruneSettings, peers: Distributed) -> Subject:
    """Build the network to prune, or return to the compact one of an earlier run."""
    objective = load_objective(settings)
    data = open_data(settings.data, settings) if settings.data else None
    torch.manual_seed(settings.seed)
    before = None
    if settings.from_run is None:
        model = build_model(settings, data)
        source = source_of(model)
        # Weights of a user's own function are not ours to draw again.
        seed = settings.seed if settings.weights is None and source is not None and source.is_known else None
        origin = Origin(source, type(model).__name__, seed)
    else:
        base = RunDirectory.open(settings.from_run, peers)
        model, before, origin = load_pruned(base, data=data), PruningPlan.load(base.plan_path), Origin.of_run(base)
    data, objective = open_for(model, data, objective)
    example = find_example(settings, data, objective, model)
    check_fit(model, settings.model, example)
    check_batch(model, data, objective, settings.device)
    if data is not None:
        check_classes(model, data, example, objective, more=True)
    return Subject(model, example, data, objective, before, origin)


def tell(
    settings: PruneSettings,
    subject: Subject,
    result: PruningResult,
    peers: Distributed,
    loggers: OpenLoggers,
    *,
    as_json: bool,
) -> None:
    """Measure both networks, log the result and print it."""
    networks = {"baseline": subject.model, "compact": result.model}
    compared = measure(networks, subject.data, settings.device, peers, subject.objective)
    begun_with = result.graph.cost()  # with --from_run that of a compact network already
    compared["baseline"] |= {"macs": round(float(begun_with.macs)), "params": round(float(begun_with.params))}
    compared["compact"] |= {what: result.metrics[what]["planned"] for what in ("macs", "params")}
    for name, column in (("baseline", "full"), ("compact", "planned")):
        times = {"ms", "measured_ms"} & result.metrics.keys() if "ms" in result.metrics else set()
        compared[name] |= {what: result.metrics[what][column] for what in times}
    run = RunDirectory.open(str(settings.out), peers)
    line = {"stage": "result", "method": settings.method, "budget": settings.budget, **copy.deepcopy(compared)}
    run.log(line)
    loggers.log(line)
    if not result.plan.exact:
        difference, operators = result.metrics["difference"], list(result.graph.inexact)
        if as_json:
            compared["inexact"] = {"difference": difference, "operators": operators}
        elif peers.is_main:
            print_difference(difference, operators)
    if not as_json and "measured_ms" in result.metrics:  # programs compare results, and no two measurements are equal
        compared["baseline"]["measured_ms"] = result.metrics["measured_ms"]["full"]
        compared["compact"]["measured_ms"] = result.metrics["measured_ms"]["planned"]
    odd = [*tell_compensation(result.metrics), *at_chance(compared, subject.data)]
    print_results(compared, as_json, peers, run.path, [*odd, after_pruning(settings, result.metrics)])
