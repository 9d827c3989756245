"""The main job: trace, search, plan, cut, verify."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.budget import Budget, BudgetError
from fastprune.distributed import Distributed
from fastprune.engine import (
    Data,
    HeldOut,
    Interrupted,
    LoopOptions,
    Placement,
    RunDirectory,
    UserData,
    choose_device,
    run_phases,
    seed_everything,
)
from fastprune.engine.user_data import Loader
from fastprune.graph import ChannelGraph, trace
from fastprune.methods.contract import Method, Task
from fastprune.methods.registry import configure, load
from fastprune.models import save_weights
from fastprune.plan import PruningPlan
from fastprune.surgery import apply, verify


@dataclass(frozen=True)
class PruningResult:
    """What ``prune`` gives back.

    Args:
        model: the compact model, in eval mode, on the device that was used.
        plan: the channels that stay.
        metrics: ``macs`` and ``params`` (each ``{"full": …, "planned": …}``), ``difference`` (of compact and masked
            output, relative), ``seconds``, and ``search`` (the method's results and the last value of every metric that
            it logged).
        graph: the channel graph of the full model.
    """

    model: nn.Module
    plan: PruningPlan
    metrics: dict[str, Any]
    graph: ChannelGraph


def prune(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
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
    loop: LoopOptions | None = None,
    run_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> PruningResult:
    """Choose channels by a method under a budget, and give back the network without the others.

    Args:
        model: the trained network; it is not changed.
        example_inputs: a batch of inputs, [N, C, H, W] for images.
        method: a registered method's name, or a ``Method`` class.
        budget: ``flops=0.5``, ``params=0.3``, ``flops=2G``, …; met from below.
        data: training data for methods that search on them: a ``Data`` (see ``engine.load_data``), or a loader of
            (images [N, C, H, W], labels [N]) of one's own.
        out: directory for the run's files (config, plan, weights, log, checkpoints); None = nothing is written.
        resume: continue the search in ``out`` from its last checkpoint.
        seed: of everything random.
        device: "cpu", "cuda", "cuda:N" or "auto"; None = where the model is.
        precision: of the search, "float32" or "bf16" (autocast).
        channels_last: NHWC memory layout in the search.
        loop: how often log and checkpoints are written.
        run_config: what ``config.yaml`` says; None = the arguments.
        **options: fields of the method's ``Config``.

    Returns:
        The compact model, verified against the masked one, with its plan and metrics.

    Raises:
        ValueError: for an unknown method or option, missing data, or a plan that removes nothing.
        BudgetError: for a malformed budget, or one out of reach.
        TraceError, SurgeryError, RunError, Interrupted: see those.
    """
    begun = time.monotonic()
    chosen = Budget.parse(budget) if isinstance(budget, str) else budget
    method_class = load(method) if isinstance(method, str) else method
    worker = method_class(configure(method_class, options))
    if method_class.needs_data and data is None:
        raise ValueError(f"method {method_class.name!r} searches on training data: give data=")
    peers = Distributed.from_environment()
    where = _device_of(model) if device is None else choose_device(device)
    placement = Placement(where, precision, channels_last)
    seed_everything(seed)
    network = _own_copy(model, placement, trained=method_class.trains_weights)
    graph = trace(network, _to(example_inputs, where))
    chosen.limit(graph)
    source = data.to(where) if isinstance(data, Data) else None if data is None else UserData(data)
    task = Task(
        model=network,
        graph=graph,
        budget=chosen,
        device=where,
        seed=seed,
        distributed=peers,
        data=HeldOut(source, placement, peers) if source is not None else None,
        rng=torch.Generator().manual_seed(seed),
    )
    worker.setup(task)
    config = run_config or {"command": "prune", "method": method_class.name, "budget": str(chosen), "seed": seed}
    with run_directory(out, config, peers, resume=resume) as run:
        search = run_phases(
            worker, task, source, run=run, stage="search", resume=resume, placement=placement, options=loop
        )
        plan = worker.plan(task)
        check(plan, chosen, graph)
        compact, difference = cut(plan, network)
    metrics: dict[str, Any] = {
        "macs": {"full": plan.macs[0], "planned": plan.macs[1]},
        "params": {"full": plan.params[0], "planned": plan.params[1]},
        "difference": difference,
        "seconds": time.monotonic() - begun,
        "search": {**search, **{name: float(value) for name, value in worker.results().items()}},
    }
    if run is not None and peers.is_main:
        plan.save(run.plan_path)
        save_weights(compact, run.model_path)
        run.log({"stage": "plan", **metrics})
    peers.barrier()
    return PruningResult(compact.eval(), plan, metrics, graph)


def check(plan: PruningPlan, budget: Budget, graph: ChannelGraph) -> None:
    """Refuse a method's plan that breaks its promise."""
    if plan.removes_nothing:
        raise ValueError(
            f"the plan removes nothing, although the budget '{budget}' asks for less than the full network"
        )
    planned, limit = plan.macs[1] if budget.resource == "flops" else plan.params[1], budget.limit(graph)
    if planned > limit:
        raise BudgetError(f"the method's plan costs {planned}, above the budget '{budget}' ({limit:.0f})")


def cut(plan: PruningPlan, model: nn.Module) -> tuple[nn.Module, float]:
    """The compact copy and how far its output is from the masked model's."""
    compact = apply(plan, model, check=False)
    return compact, verify(plan, model, compact)


@contextmanager
def run_directory(
    out: str | Path | None, config: Mapping[str, Any], peers: Distributed, *, resume: bool
) -> Iterator[RunDirectory | None]:
    """The run's directory, new or resumed; a new one goes again if bad input is found before anything was logged."""
    if out is None:
        if resume:
            raise ValueError("resume: give out=, the directory of the run to continue")
        yield None
        return
    run = RunDirectory.open(out, peers) if resume else RunDirectory.create(out, config, peers)
    try:
        yield run
    except Exception as error:
        if not resume and peers.is_main and not run.metrics_path.exists() and not isinstance(error, Interrupted):
            shutil.rmtree(run.path)
        raise


def _own_copy(model: nn.Module, placement: Placement, *, trained: bool) -> nn.Module:
    """The model in eval mode on its device; a copy, unless it already is there and nothing will change it."""
    there = _device_of(model) == placement.device and not placement.channels_last
    if trained or not there or model.training:
        model = placement.model(copy.deepcopy(model))
    return model.eval()


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _to(example: Tensor | Sequence[Tensor], device: torch.device) -> Tensor | tuple[Tensor, ...]:
    if isinstance(example, Tensor):
        return example.to(device)
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in example)
