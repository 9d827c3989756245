"""The main job: trace, search, plan, cut, verify."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune.arguments import check_arguments, check_kind, make_objective
from fastprune.data.given import GivenData, as_data, note_data
from fastprune.data.user_data import Loader
from fastprune.engine import (
    LoopOptions,
    Placement,
    RunDirectory,
    choose_device,
)
from fastprune.engine.loggers import Callback, Logger, MakeLogger, load_loggers
from fastprune.engine.loop import floats
from fastprune.engine.run import run_directory
from fastprune.graph.build import layer_names
from fastprune.graph.export.inputs import Example
from fastprune.graph.model_state import device_of
from fastprune.graph.plan import PruningPlan
from fastprune.host.distributed import Distributed
from fastprune.job import Job, RunOptions, Tracing, make_worker
from fastprune.methods.contract import Method
from fastprune.models import Source
from fastprune.planning.budget import Budget, Conditions
from fastprune.planning.goal import Goal
from fastprune.planning.limits import Limits
from fastprune.recovery import CALIBRATION_IMAGES, Choice, Recovery
from fastprune.result import PruningResult
from fastprune.runs.origin import Origin
from fastprune.surgery.surgery import Cut
from fastprune.training.objective import Forward, Loss

__all__ = ["PruningResult", "prune"]


def prune(
    model: nn.Module,
    example_inputs: Example,
    *,
    method: str | type[Method] = "dmc",
    budget: str | float | Budget = "flops=0.5",
    data: GivenData | None = None,
    held_out: Loader | float | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str = "float32",
    channels_last: bool = False,
    rewrite: bool = True,
    ignore: str | nn.Module | Sequence[str | nn.Module] = (),
    limits: Limits | Mapping[str, Any] | None = None,
    conditions: Conditions | None = None,
    after: PruningPlan | None = None,
    exact: bool = True,
    replace_norms: bool = False,
    heads: bool = False,
    compensate: Choice = "auto",
    calibration: int = CALIBRATION_IMAGES,
    loop: LoopOptions | None = None,
    run_config: Mapping[str, Any] | None = None,
    origin: Source | Origin | None = None,
    log: Sequence[str | MakeLogger | Logger] = (),
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> PruningResult:
    """Choose channels by a method under a budget, and remove the others.

    Args:
        model: the trained network; it is not changed.
        example_inputs: a batch of inputs, [N, C, H, W] for images; several as a tuple, or as a dict by argument name.
        method: the name of a registered method, or a ``Method`` class.
        budget: ``flops=0.5``, ``params=0.3``, ``latency=0.6``, ``flops=2G``, ``latency=12ms``, …, see
            ``Budget.parse``; a number is a fraction of the FLOPs (MACs). Met from below; a latency that is measured
            more than 3 % from its budget is corrected, to either side of it, see ``Conditions``.
        data: training data for methods that search on them: your own ``DataLoader``, or any other iterable of batches
            that starts anew each time; a ``Data``; or the name of a data set (see ``fastprune.data.load_data``).
        held_out: a loader of samples that are not trained on, for methods that compare candidates; beside the name of a
            data set, the part to hold out.
        loss: ``loss(output, target)`` returns the mean loss of a batch; None = cross-entropy to class labels [N].
        forward: ``forward(model, batch)`` runs ``model`` on a batch of the loader and returns ``(output, target)``; it
            must only call ``model``, which may be the network under gates. None = batches are tuples whose last part
            is the target; the others are the network's inputs.
        out: directory for the run's files (config, plan, weights, log, checkpoints); None = nothing is written.
        resume: whether to continue the search in ``out`` from its last checkpoint.
        seed: seed of everything random.
        device: "cpu", "cuda", "cuda:N" or "auto"; None = where the model is.
        precision: precision of the search, "float32" or "bf16" (autocast).
        channels_last: whether the search's memory layout is NHWC.
        rewrite: whether the compact network may be the rewritten graph of the model; see ``trace``.
        ignore: names, patterns or modules of layers whose output channels stay; see ``trace``.
        limits: smallest and largest widths and their rounding, for any method: ``Limits``, or a dict such as
            ``{"round_to": 8}``; None = none.
        conditions: conditions under which a latency counts (device, batch, dtype, layout); None = one image on
            ``device``.
        after: the plan that made ``model`` out of a larger network; the result's plan is then for that network.
        exact: whether only channels go whose removal equals zeroing what reads them; see ``trace``. False = the compact
            network may differ from the masked one: ``metrics["difference"]`` says by how much on a random input, and
            ``graph.inexact`` because of which operators.
        replace_norms: whether channels also leave norms over channels, exactly: the class of these norms changes; see
            ``trace``.
        heads: whether whole heads of attention leave; see ``trace``.
        compensate: how the layers that read removed channels make up for them, without training: "sequential" is best,
            then "one_pass", "mean", "bn" (see ``fastprune.recovery``); needs ``data``. "none" = they stay as they are.
            "auto" = "sequential" where ``data`` are given, otherwise "none".
        calibration: number of training samples that ``compensate`` takes.
        loop: how often log and checkpoints are written.
        run_config: settings for ``config.yaml`` beside the arguments.
        origin: what builds the full network again, so that ``fastprune.load`` needs no ``model=``:
            ``fastprune.models.Source("torchvision:resnet50", num_classes=10)``. None = what ``models.create`` has noted
            in the model, if it made it.
        log: loggers: names ("tensorboard", "csv", "wandb", "mlflow") or functions of the run's folder and settings that
            return one, which need ``out``; or ``Logger`` objects.
        callbacks: functions that get every record of the log, a dict with ``stage``, ``step`` and metrics.
        **options: fields of the method's ``Config``.

    Returns:
        The compact model, verified against the masked one (measured, under an inexact plan), with its plan and metrics.

    Raises:
        ValueError: for an unknown method or option, missing data, data that do not fit the example, a run to resume
            that was begun with other arguments or weights, an origin of another network, or a plan that removes
            nothing.
        TypeError: for an argument of a wrong type.
        BudgetError: for a malformed budget, or one out of reach; says what limits it.
        LimitError: for limits that contradict each other.
        TraceError, SurgeryError, RunError, Interrupted: see those.
    """
    begun = time.monotonic()
    check_arguments(
        model=model, out=out, resume=resume, seed=seed, device=device, precision=precision, channels_last=channels_last,
        rewrite=rewrite, exact=exact, replace_norms=replace_norms, heads=heads,
        run_config=run_config,
    )  # fmt: skip
    check_kind("conditions", conditions, Conditions)
    check_kind("after", after, PruningPlan)
    check_kind("loop", loop, LoopOptions)
    where = device_of(model) if device is None else choose_device(str(device))
    goal = Goal.make(budget, conditions, limits, where)
    tracing = Tracing(rewrite, layer_names(model, ignore), exact, replace_norms, heads)
    config = {**note_data(data, held_out), **(run_config or {})}
    running = RunOptions(Placement(where, precision, channels_last), seed, loop, out, resume, config)
    recovery = Recovery.choose(compensate, calibration, data)
    makers = load_loggers(log)
    worker = make_worker(method, options, data)
    job = Job(worker, goal, tracing, running, Distributed.from_environment(), make_objective(loss, forward), recovery)
    begun_as = origin if isinstance(origin, Origin) else Origin.find(model, origin, after)
    network, inputs, source = job.prepare(model, example_inputs, as_data(data, held_out, seed=seed))
    task = job.trace(network, inputs, source)
    with ExitStack() as logging:
        with run_directory(out, job.settings(), job.peers, resume=resume) as run:
            records = logging.enter_context(job.open_records(makers, callbacks, run))
            found = job.search(task, source, run, records)

            keep = partial(keep_networks, job, run, begun_as, model, after)
            compact, compensation = job.cut(task, source, keep)
        plan = keep(compact)
        metrics: dict[str, Any] = {
            "macs": {"full": plan.macs[0], "planned": plan.macs[1]},
            "params": {"full": plan.params[0], "planned": plan.params[1]},
            "difference": compact.difference,
            "seconds": time.monotonic() - begun,
            "search": {**found, **floats(worker.results())},
            **compensation,
        }
        metrics |= job.time(task, compact, inputs)  # what took hours is saved by now
        job.log(run, metrics, records)
    return PruningResult(
        compact.model.eval(), plan, metrics, task.graph, worker.name, goal.text, job.settings(), begun_as
    )


def keep_networks(
    job: Job, run: RunDirectory | None, origin: Origin, model: nn.Module, after: PruningPlan | None, found: Cut
) -> PruningPlan:
    """Write both networks and the plan into the run, if there is one; return the plan.

    Args:
        job: the steps.
        run: the run.
        origin: what builds the full network.
        model: the network that was pruned.
        after: the plan by which it had been pruned before.
        found: the compact network.
    """
    plan = found.plan if after is None else after.then(found.plan)
    if run is not None and job.peers.is_main:
        origin.keep(run, model, plan.inputs, is_full=after is None)
    job.save(run, found.model, plan)
    return plan
