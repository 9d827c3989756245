"""The main job: trace, search, plan, cut, verify."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune.data import Data, UserData
from fastprune.data.user_data import Loader
from fastprune.engine import (
    HeldOut,
    LoopOptions,
    Placement,
    RunDirectory,
    choose_device,
    measure_latencies,
    run_phases,
    seed_everything,
)
from fastprune.engine.run import plain, run_directory
from fastprune.graph import ChannelGraph, trace
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.plan import PruningPlan
from fastprune.host.distributed import Distributed
from fastprune.methods.contract import Method, Task
from fastprune.methods.registry import configure, load
from fastprune.models import save_weights
from fastprune.options import fields_of
from fastprune.planning.budget import Budget, BudgetError, Conditions
from fastprune.planning.limits import LimitError, Limits
from fastprune.surgery import cut
from fastprune.surgery.slicing import copied


@dataclass(frozen=True)
class PruningResult:
    """What ``prune`` gives back.

    Args:
        model: the compact model, in eval mode, on the device that was used.
        plan: the channels that stay.
        metrics: ``macs`` and ``params`` (each ``{"full": …, "planned": …}``), ``difference`` (of compact and masked
            output, relative), ``seconds``, and ``search`` (the method's results and the last value of every metric that
            it logged); under a budget of latency ``ms``, with which the plan was made, and ``measured_ms``, of the
            networks themselves.
        graph: the channel graph of the full model.
    """

    model: nn.Module
    plan: PruningPlan
    metrics: dict[str, Any]
    graph: ChannelGraph


def prune(
    model: nn.Module,
    example_inputs: Example,
    *,
    method: str | type[Method] = "dmc",
    budget: str | Budget = "flops=0.5",
    data: Data | Loader | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
    precision: str = "float32",
    channels_last: bool = False,
    rewrite: bool = True,
    ignore: Sequence[str] = (),
    limits: Limits | None = None,
    conditions: Conditions | None = None,
    after: PruningPlan | None = None,
    exact: bool = True,
    loop: LoopOptions | None = None,
    run_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> PruningResult:
    """Choose channels by a method under a budget, and give back the network without the others.

    Args:
        model: the trained network; it is not changed.
        example_inputs: a batch of inputs, [N, C, H, W] for images; several as a tuple, or as a dict by argument name.
        method: a registered method's name, or a ``Method`` class.
        budget: ``flops=0.5``, ``params=0.3``, ``latency=0.6``, ``flops=2G``, ``latency=12ms``, …, see
            ``Budget.parse``; met from below.
        data: training data for methods that search on them: a ``Data`` (see ``engine.load_data``), or a loader of
            (images [N, C, H, W], labels [N]) of one's own.
        out: directory for the run's files (config, plan, weights, log, checkpoints); None = nothing is written.
        resume: continue the search in ``out`` from its last checkpoint.
        seed: of everything random.
        device: "cpu", "cuda", "cuda:N" or "auto"; None = where the model is.
        precision: of the search, "float32" or "bf16" (autocast).
        channels_last: NHWC memory layout in the search.
        rewrite: whether the compact network may be the rewritten graph of the model; see ``trace``.
        ignore: names or patterns of layers whose output channels stay; see ``trace``.
        limits: least and largest widths and their rounding, whatever the method; None = none.
        conditions: under which a latency counts (device, batch, dtype, layout); None = one image on ``device``.
        after: the plan that made ``model`` out of a larger network; the result's plan is then for that one.
        exact: whether only channels go whose removal equals zeroing what reads them; see ``trace``. False = the compact
            network may differ from the masked one: ``metrics["difference"]`` says by how much on a random input, and
            ``graph.inexact`` because of which operators.
        loop: how often log and checkpoints are written.
        run_config: what ``config.yaml`` says; None = the arguments.
        **options: fields of the method's ``Config``.

    Returns:
        The compact model, verified against the masked one (measured, under an inexact plan), with its plan and metrics.

    Raises:
        ValueError: for an unknown method or option, missing data, data that do not fit the example, a run to resume
            that was begun with other arguments, or a plan that removes nothing.
        BudgetError: for a malformed budget, or one out of reach; says what limits it.
        LimitError: for limits that contradict each other.
        TraceError, SurgeryError, RunError, Interrupted: see those.
    """
    begun = time.monotonic()
    chosen = Budget.parse(budget) if isinstance(budget, str) else budget
    limits = limits or Limits()
    where = _device_of(model) if device is None else choose_device(device)
    chosen = chosen.under(conditions, where)
    method_class = load(method) if isinstance(method, str) else method
    worker = method_class(configure(method_class, options))
    if method_class.needs_data and data is None:
        raise ValueError(f"method {method_class.name!r} searches on training data: give data=")
    if resume and out is None:
        raise ValueError("resume: give out=, the directory of the run to continue")
    config = {
        "command": "prune",
        **(run_config or {}),
        "method": method_class.name,
        "budget": budget if isinstance(budget, str) else budget.text,
        **limits.as_settings(),
        **chosen.condition_settings,
        "keep_class": not rewrite,
        "inexact": not exact,
        "ignore": list(ignore),
        "precision": precision,
        "channels_last": channels_last,
        "seed": seed,
        method_class.name: plain({f.name: getattr(worker.config, f.name) for f in fields_of(type(worker.config))}),
    }
    peers = Distributed.from_environment()
    if resume:
        same_run(RunDirectory.open(str(out), peers), config)
    placement = Placement(where, precision, channels_last)
    source = data.to(where) if isinstance(data, Data) else None if data is None else UserData(data)
    inputs = Inputs.of(example_inputs, model)
    if source is not None:
        _same_channels(source, inputs)
    seed_everything(seed)
    network = _own_copy(model, placement, trained=method_class.trains_weights)
    graph = trace(network, inputs.map(lambda x: x.to(where)), rewrite=rewrite, ignore=ignore, exact=exact)
    chosen.meter(graph, peers)
    chosen.limit(graph)
    limits.widths(graph)
    task = Task(
        model=network,
        graph=graph,
        budget=chosen,
        limits=limits,
        device=where,
        seed=seed,
        distributed=peers,
        data=HeldOut(source, placement, peers) if source is not None else None,
        rng=torch.Generator().manual_seed(seed),
    )
    worker.setup(task)
    with run_directory(out, config, peers, resume=resume) as run:
        search = run_phases(
            worker, task, source, run=run, stage="search", resume=resume, placement=placement, options=loop
        )
        plan = worker.plan(task)
        check(plan, chosen, limits, graph)
        done = cut(plan, network, graph.traced)
        whole = done.plan if after is None else after.then(done.plan)
    metrics: dict[str, Any] = {
        "macs": {"full": whole.macs[0], "planned": whole.macs[1]},
        "params": {"full": whole.params[0], "planned": whole.params[1]},
        "difference": done.difference,
        "seconds": time.monotonic() - begun,
        "search": {**search, **{name: float(value) for name, value in worker.results().items()}},
    }
    if run is not None and peers.is_main:
        whole.save(run.plan_path)
        save_weights(done.model, run.model_path)
    if chosen.is_time:
        metrics["ms"] = {"full": float(chosen.cost(graph)), "planned": float(chosen.cost(graph, plan.mask))}
        if peers.is_main:  # one process at a time, and what took hours is saved by now
            metrics |= measured(chosen.conditions, graph, {"full": network, "planned": done.model})
    if run is not None and peers.is_main:
        run.log({"stage": "plan", **metrics})
    peers.barrier()
    return PruningResult(done.model.eval(), whole, metrics, graph)


def measured(under: Conditions, graph: ChannelGraph, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """``measured_ms``, of the networks themselves; nothing where they take something else than one batch of images."""
    images = graph.traced.inputs.tensors
    if len(images) > 1 or images[0].dim() != 4:
        return {}
    layout = torch.channels_last if under.channels_last else torch.contiguous_format
    copies = {
        name: copied(network).to(torch.device(str(under.device)), getattr(torch, under.dtype))
        .to(memory_format=layout)
        for name, network in networks.items()
    }  # fmt: skip
    channels, height, width = images[0].shape[1:]
    return {"measured_ms": measure_latencies(copies, (channels, height, width), batch=under.batch, repeats=10)}


def check(plan: PruningPlan, budget: Budget, limits: Limits, graph: ChannelGraph) -> None:
    """Refuse a method's plan that breaks its promise."""
    if plan.removes_nothing:
        raise ValueError(
            f"the plan removes nothing, although the budget '{budget}' asks for less than the full network"
        )
    planned, limit = float(budget.cost(graph, plan.mask)), budget.limit(graph)
    if planned > limit:
        raise BudgetError(f"the method's plan costs {planned:.10g}, above the budget '{budget}' ({limit:.10g})")
    broken = limits.broken_by(graph, plan.mask)
    if broken is not None:
        raise LimitError(f"the method's plan: {broken}")


def same_run(run: RunDirectory, config: Mapping[str, Any]) -> None:
    """Refuse to go on with a search that was begun with other arguments."""
    written = run.config
    result_depends_on = {name for name in config if name.startswith("latency_")} | {
        *("method", "budget", "seed", config["method"], "min_keep", "round_to", "keep_ratio"),
        *("keep_class", "inexact", "ignore", "precision", "channels_last"),
    }
    for name in sorted(result_depends_on):
        if name in written and written[name] != config[name]:
            raise ValueError(
                f"resume: {str(run.path)!r} was begun with {name} {written[name]!r}, not {config[name]!r}; "
                "give the same, or another directory"
            )


def _own_copy(model: nn.Module, placement: Placement, *, trained: bool) -> nn.Module:
    """The model in eval mode on its device; a copy, unless it already is there and nothing will change it."""
    there = _device_of(model) == placement.device and not placement.channels_last
    if trained or not there or any(module.training for module in model.modules()):
        model = placement.model(copied(model))
    return model.eval()


def _same_channels(data: Data, inputs: Inputs) -> None:
    """Refuse data whose images the traced network cannot take; a convolution would say so only in the first step."""
    first = inputs.tensors[0]
    if first.dim() == 4 and first.shape[1] != data.shape[0]:
        raise ValueError(
            f"data: its images have {data.shape[0]} channels, those of example_inputs {first.shape[1]}; "
            "give images of one kind"
        )


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
