"""Pruning in several steps, with training between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.budget import Budget
from fastprune.graph import ChannelGraph, trace
from fastprune.graph.inputs import Example
from fastprune.limits import Limits, groups_of_layers
from fastprune.pruning import PruningResult, prune


def prune_in_steps(
    model: nn.Module,
    example_inputs: Example,
    *,
    steps: int,
    budget: str | Budget = "flops=0.5",
    limits: Limits | None = None,
    out: str | Path | None = None,
    **arguments: Any,
) -> Iterator[PruningResult]:
    """Prune towards a budget in equal steps. Whatever is done to a step's model, the next one goes on from there.

    Args:
        model: the trained network; it is not changed.
        example_inputs: as ``prune`` takes them.
        steps: how many; after step i of n, the part i/n of what the budget takes away is gone.
        budget: of the last step, relative to ``model``.
        limits: of the widths, relative to ``model`` in every step.
        out: directory for the runs ``step-1``, ``step-2``, …; None = nothing is written.
        **arguments: the others of ``prune`` (method, data, its options, …).

    Yields:
        The result of each step. Its ``model`` is the network to train before the next one is asked for; its ``plan``
        leads from the first ``model`` to it, its ``graph`` is that of the network before the step.

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
        raise ValueError("resume and after belong to single calls of prune")
    tracing = {name: arguments[name] for name in ("rewrite", "ignore", "exact") if name in arguments}
    last = Budget.parse(budget) if isinstance(budget, str) else budget
    under = arguments.pop("conditions", None) or last.conditions
    last = replace(last, conditions=replace(under, device=under.device or arguments.get("device")))
    first = current = trace(model, example_inputs, **tracing)
    full, limit = float(last.cost(first)), last.limit(first)
    plan = None
    for step in range(1, steps + 1):
        result = prune(
            model,
            example_inputs,
            budget=replace(last, value=full - (full - limit) * step / steps, absolute=True),
            limits=relative_to(limits or Limits(), first, current),
            out=None if out is None else Path(out) / f"step-{step}",
            after=plan,
            **arguments,
        )
        yield result
        if step < steps:
            model, plan = result.model, result.plan
            current = trace(model, example_inputs, **tracing)


def relative_to(limits: Limits, first: ChannelGraph, current: ChannelGraph) -> Limits:
    """Limits of the first network's widths as limits of what is left of it."""
    if first is current:
        return limits
    sizes = {group.name: group.size for group in first.groups}
    ratios: dict[str, tuple[float, float]] = {}
    for pattern, (least, most) in limits.keep_ratios.items():
        for g in groups_of_layers(current, pattern):
            group = current.groups[g]
            grown = sizes.get(group.name, group.size) / group.size
            before = ratios.get(group.name, (0.0, 1.0))
            ratios[group.name] = max(before[0], min(1.0, least * grown)), min(before[1], min(1.0, most * grown))
    return replace(limits, keep_ratios=ratios)
