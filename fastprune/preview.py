"""What a pruning would do, without doing it: groups, widths at an equal ratio, cost, limits and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from fastprune.data import Data
from fastprune.engine import Placement
from fastprune.engine.phase_batches import PhaseBatches
from fastprune.graph import Group
from fastprune.graph.interior import gated_units
from fastprune.methods.contract import Method, Task
from fastprune.methods.scores.ranking import local_priority
from fastprune.planning.fitting import fit
from fastprune.training.phases import Phase, Rounds

TIMED = 5  # steps of a phase that are timed, after one that is not


@dataclass(frozen=True)
class GroupPreview:
    """A group, and how much of it stays if all groups keep the same part.

    Args:
        group: the group.
        prunable: number of its units that the method may remove.
        kept: number of units that stay under the budget.
        least: the smallest number of units that may stay.
    """

    group: Group
    prunable: int
    kept: int
    least: int


@dataclass(frozen=True)
class Preview:
    """What a pruning would do.

    Args:
        groups: all groups.
        full: the cost of the network, in the budget's unit.
        limit: the largest cost that the budget allows.
        planned: the cost at an equal ratio.
        least: the smallest cost that is in reach.
        largest: the layers that cost most at the smallest cost, with their parts of it.
        seconds: the estimated time of the search; None = unknown.
        how: what the estimate is made of, or why there is none.
    """

    groups: tuple[GroupPreview, ...]
    full: float
    limit: float
    planned: float
    least: float
    largest: tuple[tuple[str, float], ...]
    seconds: float | None
    how: str


def preview(worker: Method, task: Task, data: Data | None, placement: Placement) -> Preview:
    """Say what a method would do. A few steps of its search are taken, so worker and task are of no use afterwards.

    Args:
        worker: the method, after ``setup``.
        task: its task.
        data: the training data.
        placement: device, precision and layout of the search.

    Raises:
        BudgetError: if the budget is out of reach; says what limits it.
    """
    graph, budget = task.graph, task.budget
    may_go = prunable_units(worker, task)
    order = local_priority(graph, -torch.arange(graph.num_units, dtype=torch.float64))
    mask = fit(graph, budget, order, prunable=may_go, limits=task.limits)
    groups = []
    for group, widths in zip(graph.groups, task.limits.widths(graph), strict=True):
        free = int(may_go[group.units].sum())
        least = max(widths.least, group.size - free, 1)
        groups.append(GroupPreview(group, free, int(mask[group.units].sum()), least))
    smallest = torch.cat([torch.arange(g.group.size) < g.least for g in groups])
    seconds, how = estimate_time(worker, task, data, placement)
    return Preview(
        tuple(groups),
        float(budget.cost(graph)),
        budget.limit(graph),
        float(budget.cost(graph, mask)),
        float(budget.cost(graph, smallest)),
        tuple(budget.largest_layers(graph, smallest)),
        seconds,
        how,
    )


def prunable_units(worker: Method, task: Task) -> Tensor:
    """Return the units that a method may remove, bool [U]: as its ``setup`` found, or by its option ``groups``."""
    found = getattr(worker, "prunable_units", None)
    if isinstance(found, Tensor):
        return found.cpu()
    return gated_units(task.graph, getattr(worker.config, "groups", "all"))


def estimate_time(worker: Method, task: Task, data: Data | None, placement: Placement) -> tuple[float | None, str]:
    """Time a few steps of each phase, and return seconds for all of them with the way to this number."""
    phases = list(worker.phases(task))
    if any(isinstance(phase, Rounds) for phase in phases):
        names = ", ".join(repr(phase.name) for phase in phases if isinstance(phase, Rounds))
        return None, f"unknown: the number of rounds in {names} depends on what is found on the way"
    if not phases or data is None:
        return None, "none: the method does not search, it takes about as long as this preview"
    total, parts = 0.0, []
    for number, phase in enumerate(phases):
        assert isinstance(phase, Phase)
        steps = PhaseBatches(data, number, task.seed, task.distributed).steps(phase) * phase.epochs
        if not steps:
            continue
        each = time_step(phase, number, task, data, placement)
        total += each * steps
        parts.append(f"{steps:,} steps of {1000 * each:.0f} ms in {phase.name!r}")
    return total, f"{', '.join(parts)}; without evaluations, cutting and verifying"


def time_step(phase: Phase, number: int, task: Task, data: Data, placement: Placement) -> float:
    """Return the seconds of one step, with its share of the side steps."""
    reader = PhaseBatches(data, number, task.seed, task.distributed)
    seconds = typical_seconds(phase.step, islice(reader.read(phase, 0, 0), 1 + TIMED), placement)
    if phase.beside is not None:
        batches = islice(reader.side(phase.beside, 0), 1 + TIMED)
        seconds += typical_seconds(phase.beside.step, batches, placement) / phase.beside.every
    return seconds


def typical_seconds(step: object, batches: Iterator[tuple[Tensor, Tensor]], placement: Placement) -> float:
    """Return the median time of a step over batches, with reading them; the first one is left out if there are more."""
    times = []
    begun = time.perf_counter()
    for images, labels in batches:
        with placement.autocast():
            step(placement.images(images), placement.labels(labels))  # type: ignore[operator]
        if placement.device.type == "cuda":
            torch.cuda.synchronize(placement.device)
        times.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    return statistics.median(times[1:] or times)
