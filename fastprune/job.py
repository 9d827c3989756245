"""The steps of a pruning: trace, search, cut, compensate, save, time."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.arguments import refuse_resources
from fastprune.data import Data, UserData
from fastprune.engine import (
    HeldOut,
    LoopOptions,
    Placement,
    RunDirectory,
    measure_latencies,
    run_phases,
    seed_everything,
)
from fastprune.engine.checkpoint import weights_checksum
from fastprune.engine.latency import time_calls
from fastprune.engine.loggers import Callback, Logger, MakeLogger, Records, open_records
from fastprune.engine.run import plain
from fastprune.graph import ChannelGraph
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.model_state import device_of, in_eval_mode
from fastprune.graph.plan import PruningPlan
from fastprune.host import progress
from fastprune.host.distributed import Distributed
from fastprune.host.errors import Interrupted
from fastprune.host.machine import machine
from fastprune.methods.contract import Method, Task
from fastprune.methods.registry import configure, load
from fastprune.models import save_weights
from fastprune.options import fields_of
from fastprune.planning.budget import BudgetError, Conditions
from fastprune.planning.correction import CLOSE, excess, next_budget
from fastprune.planning.goal import Goal
from fastprune.recovery import CALIBRATION_IMAGES, Recovery, calibration_inputs, compensate_weights
from fastprune.surgery import cut, trace
from fastprune.surgery.slicing import copy_model
from fastprune.surgery.surgery import Cut
from fastprune.training.objective import Objective

log = logging.getLogger(__name__)

CORRECTIONS = 2  # the model is close; what a third plan would gain is within the noise of measurements

TIMING: Mapping[str, Any] = {"repeats": 10, "warmup": 2, "choose": min, "seconds": 4.0}
"""How the networks are timed: the fastest of ten passes, of fewer where they take long.

With two threads on two busy cores the median of ResNet-18 was 817 ms; an idle machine takes 50.
"""


@dataclass(frozen=True)
class Tracing:
    """How the channel graph is found; the fields are arguments of ``fastprune.trace``."""

    rewrite: bool = True
    ignore: Sequence[str] = ()
    exact: bool = True
    replace_norms: bool = False
    heads: bool = False

    def trace(self, model: nn.Module, inputs: Inputs, device: torch.device) -> ChannelGraph:
        """Return the channel graph of a model on ``device``."""
        there = inputs.map(lambda x: x.to(device))
        return trace(
            model, there, rewrite=self.rewrite, ignore=self.ignore, exact=self.exact,
            replace_norms=self.replace_norms, heads=self.heads,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Return the fields as options of the command line."""
        return {
            "keep_class": not self.rewrite, "inexact": not self.exact, "ignore": list(self.ignore),
            "replace_norms": self.replace_norms, "heads": self.heads,
        }  # fmt: skip


@dataclass(frozen=True)
class RunOptions:
    """How a search runs, and where its files go.

    Args:
        placement: device, precision and memory layout.
        seed: seed of everything random.
        loop: how often log and checkpoints are written.
        out: directory of the run; None = nothing is written.
        resume: whether to continue the search in ``out``.
        config: settings that ``config.yaml`` has beside those of ``prune``.

    Raises:
        ValueError: to resume without a directory.
    """

    placement: Placement
    seed: int
    loop: LoopOptions | None
    out: str | Path | None
    resume: bool
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise ValueError("resume: give out=, the directory of the run to continue")

    def settings(self) -> dict[str, Any]:
        """Return the fields that the result depends on, as options of the command line."""
        place = self.placement
        return {"precision": place.precision, "channels_last": place.channels_last, "seed": self.seed}


def make_worker(method: str | type[Method], options: Mapping[str, Any], data: object) -> Method:
    """Return a method, ready for ``setup``.

    Raises:
        ValueError: for an unknown method or option, or a method that lacks its data.
        TypeError: for an option of another type, or a method that is neither a name nor a class.
    """
    if not isinstance(method, str) and not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"method: got {method!r}; the name of a method or a class derived from Method is needed")
    refuse_resources(options)
    method_class = load(method) if isinstance(method, str) else method
    worker = method_class(configure(method_class, options))
    if method_class.needs_data and data is None:
        raise ValueError(f"method {method_class.name!r} searches on training data: give data=, a DataLoader say")
    return worker


@dataclass(frozen=True)
class Job:
    """The steps of ``prune``.

    Args:
        worker: the method.
        goal: the goal of the search.
        tracing: how the channel graph is found.
        running: how the search runs.
        peers: this process among its peers.
        objective: how networks run on a batch, and their loss.
        recovery: what is done for accuracy after the search.
    """

    worker: Method
    goal: Goal
    tracing: Tracing
    running: RunOptions
    peers: Distributed
    objective: Objective
    recovery: Recovery = field(default_factory=Recovery)

    @property
    def shows(self) -> bool:
        """Whether this process shows progress."""
        return self.peers.is_main and (self.running.loop is None or self.running.loop.progress)

    def settings(self) -> dict[str, Any]:
        """Return the content of ``config.yaml``."""
        config = self.worker.config
        return {
            "command": "prune",
            **self.running.config,
            "method": self.worker.name,
            **self.goal.settings(),
            **self.tracing.settings(),
            **self.running.settings(),
            **self.recovery.settings(),
            self.worker.name: plain({f.name: getattr(config, f.name) for f in fields_of(type(config))}),
        }

    def prepare(self, model: nn.Module, example: Example, data: Data | None) -> tuple[nn.Module, Inputs, Data | None]:
        """Check the user's arguments, seed everything, and return the network to prune, its inputs and the data."""
        if self.running.resume:
            require_same_run(RunDirectory.open(str(self.running.out), self.peers), self.settings())
        place = self.running.placement
        source = data.to(place.device) if data is not None else None
        inputs = Inputs.from_example(example, model)
        if source is not None:
            require_same_channels(source, inputs)
        seed_everything(self.running.seed)
        network = own_copy(model, place, trained=self.worker.trains_weights)
        if isinstance(source, UserData) and self.worker.needs_data:
            require_understood(self.objective, network, source, place)
        return network, inputs, source

    def trace(self, network: nn.Module, inputs: Inputs, source: Data | None) -> Task:
        """Trace the network and set the method up for it."""
        place, seed = self.running.placement, self.running.seed
        with progress.begin("tracing the network", wanted=self.shows):
            graph = self.tracing.trace(network, inputs, place.device)
        self.goal.require_reachable(graph, self.peers)
        task = Task(
            model=network,
            graph=graph,
            budget=self.goal.budget,
            limits=self.goal.limits,
            device=place.device,
            seed=seed,
            distributed=self.peers,
            data=HeldOut(source, place, self.peers, objective=self.objective) if source is not None else None,
            rng=torch.Generator().manual_seed(seed),
            objective=self.objective,
        )
        self.worker.setup(task)
        if source is not None and self.recovery.how != "none":  # refuse data of another form before the search
            self.calibrate(task, source, graph.traced.inputs.batch * self.peers.world_size)
        return task

    def open_records(
        self, log: Sequence[MakeLogger | Logger], callbacks: Sequence[Callback], run: RunDirectory | None
    ) -> AbstractContextManager[Records]:
        """Open what gets every record of the run."""
        folder = None if run is None else run.path
        return open_records(log, callbacks, folder, self.settings(), wanted=self.peers.is_main)

    def search(self, task: Task, source: Data | None, run: RunDirectory | None, records: Records) -> dict[str, float]:
        """Run the method's phases; return the last value of every metric."""
        weights = weights_checksum(task.model) if self.running.out is not None else None
        return run_phases(
            self.worker,
            task,
            source,
            run=run,
            stage="search",
            resume=self.running.resume,
            placement=self.running.placement,
            options=self.running.loop,
            records=records,
            weights=weights,
        )

    def cut(self, task: Task, source: Data | None, keep: Callable[[Cut], object]) -> tuple[Cut, dict[str, Any]]:
        """Remove the channels that the method's plan gives up; return what was compensated too.

        Args:
            task: the finished search.
            source: the data.
            keep: saves the network as it is before a compensation, which may fail, or need more memory than there is.
        """
        with progress.begin("choosing channels", wanted=self.shows):
            plan = self.worker.plan(task)
        self.goal.check(plan, task.graph)
        with progress.begin("cutting and verifying", wanted=self.shows):
            raw = cut(plan, task.model, task.graph.traced)
        raw, done = self.correct(task, raw, keep)
        if self.recovery.how == "none" or source is None:
            return raw, done
        keep(raw)
        try:
            compact, work = self.compensate(task, raw.plan, source)
            return compact, done | work
        except Exception as error:  # a loader of the user's raises what it likes
            if self.peers.world_size > 1 or isinstance(error, Interrupted):  # the other ranks wait, or do not know
                raise
            return raw, done | self.tell_failure(error)

    def correct(self, task: Task, found: Cut, keep: Callable[[Cut], object]) -> tuple[Cut, dict[str, Any]]:
        """Plan again where the compact network misses a budget of latency as measured, and return the closest one.

        Args:
            task: the finished search.
            found: the network of the first plan.
            keep: saves it, as what is measured and planned after the search may fail.

        Returns:
            The network, and for the metrics "correction": the measured latencies of the plans, in units of the budget.
        """
        budget = self.goal.budget
        if not budget.is_time or budget.conditions.modelled or budget.lineage is not None:
            return found, {}
        keep(found)
        tried, over = [found], [self.measure_excess(task, found)]
        budgets = [budget]  # what each plan was made for, then what was planned in vain
        if not math.isfinite(over[0]):
            return found, {}
        for _ in range(CORRECTIONS):
            if abs(over[-1] - 1) <= CLOSE:
                break
            plans = [earlier.plan for earlier in tried]
            goal = replace(self.goal, budget=next_budget(budget, task.graph, plans, over))
            budgets.append(goal.budget)
            try:
                plan = self.worker.plan(replace(task, budget=goal.budget))
                goal.check(plan, task.graph)
                if torch.equal(plan.mask, plans[-1].mask):
                    break
                with progress.begin("correcting the latency", wanted=self.shows):
                    closer = cut(plan, task.model, task.graph.traced)
            except Exception as error:  # the budget is out of reach; or a method's own code, which plans once more
                if self.peers.world_size > 1 and not isinstance(error, BudgetError):  # the other ranks wait
                    raise
                break
            measured = self.measure_excess(task, closer)
            if not math.isfinite(measured):
                break
            tried.append(closer)
            over.append(measured)
        best = min(range(len(over)), key=lambda place: abs(math.log(over[place])))
        if best < len(budgets) - 1:  # what the method tells of its plan is to be of this one
            self.worker.plan(replace(task, budget=budgets[best]))
        return tried[best], {"correction": [round(measured, 4) for measured in over]}

    def measure_excess(self, task: Task, found: Cut) -> float:
        """Return the measured latency in units of the budget; inf if it cannot be measured. All ranks get one value."""
        over = math.inf
        if self.peers.is_main:
            networks = {"full": task.model, "planned": found.model}
            with contextlib.suppress(Exception):  # the model's own code may raise anything
                times = measure(self.goal.budget.conditions, task.graph, networks).get("measured_ms")
                over = excess(self.goal.budget, times) if times else over
        return float(self.peers.broadcast_(torch.tensor([over], dtype=torch.float64, device=task.device)))

    def compensate(self, task: Task, plan: PruningPlan, source: Data) -> tuple[Cut, dict[str, Any]]:
        """Return the compact network with compensated weights, and what was done, for the metrics."""
        inputs = self.calibrate(task, source, self.recovery.images)
        model, work = compensate_weights(
            task.graph, task.model, plan, inputs, self.recovery.how, peers=self.peers, show=self.shows
        )
        with progress.begin("cutting and verifying", wanted=self.shows):
            compact = cut(plan, model, task.graph.traced)
        return compact, {"compensation": {"how": self.recovery.how, **asdict(work)}}

    def tell_failure(self, error: Exception) -> dict[str, Any]:
        """Say that the weights are not compensated and how to try again; return that for the metrics."""
        how, out = self.recovery.how, self.running.out
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        again = (
            f"fp.compensate(model, result.plan, data, {how!r})"
            if out is None
            else f"fastprune calibrate {shlex.quote(str(out))} --how {how}"
        )
        log.warning("compensation failed, so the weights are as they were cut (%s); try again: %s", reason, again)
        return {"compensation": {"how": how, "failed": reason}}

    def calibrate(self, task: Task, source: Data, samples: int) -> list[list[Tensor]]:
        """Return what the full network gets for some training samples, batch by batch."""
        return calibration_inputs(
            task.graph, task.model, source, samples, seed=task.seed, objective=self.objective, peers=self.peers,
            placement=replace(self.running.placement, precision="float32"),
        )  # fmt: skip

    def save(self, run: RunDirectory | None, model: nn.Module, plan: PruningPlan) -> None:
        """Write plan and weights."""
        if run is not None and self.peers.is_main:
            plan.save(run.plan_path)
            save_weights(model, run.model_path)

    def time(self, task: Task, compact: Cut, inputs: Inputs) -> dict[str, Any]:
        """Return the measured times of both networks; under a budget of latency under its conditions, and modelled too.

        Otherwise they run on the user's example as it is. One process measures; the others return what is modelled.
        """
        budget, graph = self.goal.budget, task.graph
        networks = {"full": task.model, "planned": compact.model}
        if not budget.is_time:
            if not self.peers.is_main:
                return {}
            with progress.begin("timing both networks", wanted=self.shows):
                return measure_example(networks, inputs, self.running.placement)
        times: dict[str, Any] = {
            "ms": {"full": float(budget.cost(graph)), "planned": float(budget.cost(graph, compact.plan.mask))}
        }
        if self.peers.is_main:  # one process at a time
            with progress.begin("timing both networks", wanted=self.shows):
                times |= measure(budget.conditions, graph, networks)
        return times

    def log(self, run: RunDirectory | None, metrics: Mapping[str, Any], records: Records) -> None:
        """Write the last line of the log and wait for all ranks."""
        if self.peers.is_main:
            line = {"stage": "plan", **metrics}
            if run is not None:
                run.log(line)
            records(line)
        self.peers.barrier()


def measure(
    conditions: Conditions, graph: ChannelGraph, networks: Mapping[str, nn.Module]
) -> dict[str, dict[str, float]]:
    """Time the networks themselves: ``measured_ms``; nothing if they take something else than one batch of images."""
    images = graph.traced.inputs.tensors
    if len(images) > 1 or images[0].dim() != 4:
        return {}
    layout = torch.channels_last if conditions.channels_last else torch.contiguous_format
    copies = {
        name: copy_model(network).to(torch.device(str(conditions.device)), getattr(torch, conditions.dtype))
        .to(memory_format=layout)
        for name, network in networks.items()
    }  # fmt: skip
    channels, height, width = images[0].shape[1:]
    return {
        "measured_ms": measure_latencies(copies, (channels, height, width), batch=conditions.batch, **TIMING),
        "measured_on": describe(torch.device(str(conditions.device)), conditions.batch),
    }


def measure_example(networks: Mapping[str, nn.Module], inputs: Inputs, placement: Placement) -> dict[str, Any]:
    """Time networks on the example: ``measured_ms`` and ``measured_on``; nothing if a network fails.

    A measurement that fails must not cost the result of a search.
    """
    there = inputs.map(lambda x: x.to(placement.device))
    calls = {name: partial(network, *there.args, **there.kwargs) for name, network in networks.items()}
    try:
        with in_eval_mode(*networks.values()):
            times = time_calls(calls, dict.fromkeys(calls, placement.device), **TIMING)
    except Exception:  # the model's own code may raise anything
        return {}
    return {"measured_ms": times, "measured_on": describe(placement.device, inputs.batch)}


def describe(device: torch.device, batch: int) -> dict[str, Any]:
    """Return the conditions of a measurement, for the log."""
    return {"device": device.type, "name": machine(device), "threads": torch.get_num_threads(), "batch": batch}


def require_same_run(run: RunDirectory, config: Mapping[str, Any]) -> None:
    """Refuse to continue a search that was begun with other arguments."""
    begun_with = run.config
    result_depends_on = {name for name in config if name.startswith("latency_")} | {
        *("method", "budget", "seed", config["method"], "min_keep", "round_to", "keep_ratio"),
        *("keep_class", "inexact", "ignore", "replace_norms", "heads"),
        *("precision", "channels_last", "compensate", "calibration"),
    }
    # What runs of earlier versions did.
    earlier = {"compensate": "none", "calibration": CALIBRATION_IMAGES, "replace_norms": False, "heads": False}
    for name in sorted(result_depends_on):
        before = begun_with.get(name, earlier.get(name, config[name]))
        if before != config[name]:
            raise ValueError(
                f"resume: {str(run.path)!r} was begun with {name} {before!r}, not {config[name]!r}; "
                "give the same, or another directory"
            )


def require_same_channels(data: Data, inputs: Inputs) -> None:
    """Refuse data whose images the network cannot take; a convolution would say so only in the first step."""
    first = inputs.tensors[0]
    if first.dim() == 4 and len(data.shape) == 3 and first.shape[1] != data.shape[0]:
        raise ValueError(
            f"data: its images have {data.shape[0]} channels, those of example_inputs {first.shape[1]}; "
            "give images of one kind"
        )


def require_understood(objective: Objective, network: nn.Module, data: UserData, placement: Placement) -> None:
    """Refuse a user's batches that do not go through the network and its loss; the search would say so much later."""
    inputs, targets = data.first
    with placement.autocast():
        objective.check(network, placement.images(inputs), placement.labels(targets))


def own_copy(model: nn.Module, placement: Placement, *, trained: bool) -> nn.Module:
    """Return the model in eval mode on its device: a copy, unless it is there already and nothing will change it."""
    there = device_of(model) == placement.device and not placement.channels_last
    if trained or not there or any(module.training for module in model.modules()):
        model = placement.model(copy_model(model))
    return model.eval()
