"""Pruning in several steps, with training between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.arguments import check_arguments
from fastprune.engine import RunDirectory, choose_device
from fastprune.graph.build import layer_names
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.model_state import device_of
from fastprune.host.distributed import Distributed
from fastprune.job import Tracing
from fastprune.planning.budget import Budget
from fastprune.planning.goal import Goal
from fastprune.planning.limits import Limits
from fastprune.planning.lineage import Lineage
from fastprune.pruning import PruningResult, prune
from fastprune.runs.origin import Origin


def prune_in_steps(
    model: nn.Module,
    example_inputs: Example,
    *,
    steps: int,
    budget: str | float | Budget = "flops=0.5",
    limits: Limits | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    **arguments: Any,
) -> Iterator[PruningResult]:
    """Prune towards a budget in equal steps. Each step starts from the last step's model, with all that was done to it.

    Args:
        model: the trained network; it is not changed.
        example_inputs: as for ``prune``.
        steps: number of steps; step i of n reaches i/n of the way from the full cost to the budget.
        budget: the budget of the last step. In every step channels count as much as they cost in ``model``.
        limits: limits of the widths, relative to ``model`` in every step.
        out: directory for the runs ``step-1``, ``step-2``, …; None = nothing is written.
        **arguments: the other arguments of ``prune`` (method, data, options, …).

    Yields:
        The result of each step. Train its ``model`` before you ask for the next step. Its ``plan`` leads from the first
        ``model`` to this one, its ``graph`` is that of the network before the step. A step is left out if an earlier
        one has reached its cost already (with coarse widths).

    Raises:
        ValueError: if there are no steps, or for arguments that ``prune`` refuses.

    Example:
        >>> import torch, fastprune as fp
        >>> network = fp.models.create("resnet20")
        >>> for result in fp.prune_in_steps(network, torch.zeros(1, 3, 32, 32), steps=2, method="l1"):
        ...     pass  # train result.model here
        >>> 0.49 < result.plan.macs[1] / result.plan.macs[0] <= 0.5
        True
    """
    if steps < 1:
        raise ValueError(f"steps {steps}: at least 1 is needed")
    if arguments.get("resume") or arguments.get("after") is not None:
        raise ValueError("resume and after belong to single calls of prune: leave them out")
    check_arguments(model=model, out=out)
    arguments["ignore"] = layer_names(model, arguments.get("ignore", ()))
    home = device_of(model)
    device = choose_device(arguments.get("device") or str(home))
    goal = Goal.make(budget, arguments.pop("conditions", None), limits, device)
    if goal.budget.is_time:  # parts of a modelled time add up; what a machine adds to them would count in each step
        goal = replace(goal, budget=replace(goal.budget, conditions=replace(goal.budget.conditions, modelled=True)))
    tracing = Tracing(**{f.name: arguments[f.name] for f in fields(Tracing) if f.name in arguments})
    first = tracing.trace(model, Inputs.from_example(example_inputs, model), home)
    goal.budget.meter(first, Distributed.from_environment())
    full, limit = float(goal.budget.cost(first)), goal.budget.limit(first)
    plan = None
    for step in range(1, steps + 1):
        target = full - (full - limit) * step / steps
        if plan is not None and float(goal.budget.cost(first, plan.mask)) <= target:
            continue
        lineage = Lineage(first, plan) if plan is not None else None
        run = None if out is None else Path(out) / f"step-{step}"
        result = prune(
            model,
            example_inputs,
            budget=replace(goal.budget, value=target, absolute=True, lineage=lineage),
            limits=replace(goal.limits, lineage=lineage),
            out=run,
            after=plan,
            **arguments,
        )
        if run is not None and Distributed.from_environment().is_main:  # the others write nothing
            arguments["origin"] = Origin.of_run(RunDirectory.open(run))
        yield result
        model, plan = result.model, result.plan
