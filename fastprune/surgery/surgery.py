"""From plan and model to the compact model, proven exact where the plan is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fastprune.graph.export.refusals import TraceError
from fastprune.graph.export.tracing import Traced
from fastprune.graph.plan import PruningPlan
from fastprune.graph.rewrite import RewriteError
from fastprune.surgery.rewritten import rewrite_network
from fastprune.surgery.slicing import SurgeryError, slice_model, slice_optimizer
from fastprune.surgery.verification import masked, precisions_for, prove_equal, require_values, verify

__all__ = ["Cut", "SurgeryError", "apply", "cut", "masked", "slice_optimizer", "verify"]


def apply(plan: PruningPlan, model: nn.Module, *, check: bool = True) -> nn.Module:
    """Return a compact copy of ``model`` with the channels that stay, verified against the masked model.

    Under an inexact plan (see ``trace(exact=False)``) outputs may differ, by what ``verify`` returns.

    Where the model's own code cannot run on fewer channels (it holds their number, or splits at fixed places), the copy
    is a ``RewrittenNetwork``, if the plan's graph was traced with ``rewrite=True``.

    Args:
        plan: what stays.
        model: the model that was traced, or one of the same structure; it is not changed.
        check: whether ``verify`` runs. Without it the copy is not proven exact, and the model's own code is not tried
            on it.

    Returns:
        The compact copy, with smaller tensors: of the same class (or a ``RewrittenNetwork``), mode and
        ``requires_grad`` flags.

    Raises:
        PlanError: if the plan does not fit the model; names the tensor.
        SurgeryError: if the compact model does not run, which names the module, or computes something else.
    """
    if check:
        return cut(plan, model).model
    return rewrite_sliced(plan, model)[0] if plan.code == "rewritten" else slice_model(plan, model)


@dataclass(frozen=True)
class Cut:
    """A compact network that is proven exact where its plan is.

    Args:
        model: the network.
        difference: the largest difference from the masked model's outputs, relative to the largest output: rounding, or
            under an inexact plan what the removal changed beyond closing channels.
        plan: the plan; its ``code`` says what runs the network, "own" or "rewritten".
    """

    model: nn.Module
    difference: float
    plan: PruningPlan


def cut(plan: PruningPlan, model: nn.Module, traced: Traced | None = None) -> Cut:
    """Return the verified compact copy of ``model``; see ``apply``.

    Args:
        plan: what stays.
        model: the full model.
        traced: its graphs; None = traced here where they are needed.
    """
    require_values(model)
    if not plan.exact:
        return cut_inexactly(plan, model, traced)
    if plan.code == "rewritten":
        compact, plan = rewrite_sliced(plan, model, traced)
        return Cut(compact, verify(plan, model, compact), plan)
    errors: list[SurgeryError] = []
    for attempt in own_attempts(plan):
        try:
            compact = slice_model(attempt, model)
            return Cut(compact, verify(attempt, model, compact), replace(attempt, code="own"))
        except SurgeryError as error:
            errors.append(error)
    if plan.code == "own":
        raise errors[0]
    try:
        compact, plan = rewrite_sliced(plan, model, traced)
        return Cut(compact, verify(plan, model, compact), replace(plan, code="rewritten"))
    except SurgeryError as second:
        if str(second) == str(errors[0]):
            raise
        raise SurgeryError(f"{errors[0]}. Its rewritten graph fails too: {second}") from second


def own_attempts(plan: PruningPlan) -> list[PruningPlan]:
    """Return the plans under which the model's own code is tried: an attribute's value may fit a size by accident."""
    return [plan, replace(plan, attributes={})] if plan.attributes else [plan]


def cut_inexactly(plan: PruningPlan, model: nn.Module, traced: Traced | None) -> Cut:
    """Return the compact network and its measured difference.

    The masked model cannot tell whether the model's own code splits compact tensors in the right places. The rewritten
    graph can: it follows from the labels, and both must compute the same.
    """
    graph, settable = rewrite_sliced(plan, model, traced)
    difference = verify(plan, model, graph)
    errors: list[SurgeryError] = []
    for attempt in own_attempts(plan) if plan.code != "rewritten" else []:
        failure = f"the code of {type(model).__name__}, on fewer channels, and its graph differ"
        try:
            compact = slice_model(attempt, model)
            prove_equal(plan, graph, compact, precisions_for(model), failure)
            return Cut(compact, difference, replace(attempt, code="own"))
        except SurgeryError as error:
            errors.append(error)
    if plan.code == "own":
        raise errors[0]
    return Cut(graph, difference, replace(settable, code="rewritten"))


def rewrite_sliced(plan: PruningPlan, model: nn.Module, traced: Traced | None = None) -> tuple[nn.Module, PruningPlan]:
    """Return the compact network as a rewritten graph, and the plan, without attributes if they cannot be set.

    The graph does not read attributes. They change for those who do.
    """
    try:
        compact = slice_model(plan, model)
    except SurgeryError:
        if not plan.attributes:
            raise
        plan = own_attempts(plan)[-1]
        compact = slice_model(plan, model)
    try:
        return rewrite_network(plan, model, compact, traced), plan
    except (RewriteError, TraceError) as error:
        raise SurgeryError(f"the plan cannot be applied to {type(model).__name__}: {error}") from error
