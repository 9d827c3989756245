"""Plan + model → compact model, proven exact where the plan is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fastprune.graph.export.refusals import TraceError
from fastprune.graph.export.tracing import Traced
from fastprune.graph.plan import PruningPlan
from fastprune.graph.rewrite import RewriteError
from fastprune.surgery.rewritten import rewritten
from fastprune.surgery.slicing import SurgeryError, slice_optimizer, sliced
from fastprune.surgery.verification import masked, precisions_for, prove_equal, require_values, verify

__all__ = ["Cut", "SurgeryError", "apply", "cut", "masked", "slice_optimizer", "verify"]


def apply(plan: PruningPlan, model: nn.Module, *, check: bool = True) -> nn.Module:
    """A compact copy of ``model`` that has only the channels that stay, verified against the masked model.

    Under an inexact plan (see ``trace(exact=False)``) outputs may differ, by what ``verify`` returns.

    Where the model's own code cannot run on fewer channels (it holds their number, or cuts where they were), the copy
    is a ``RewrittenNetwork``, if the plan's graph was traced with ``rewrite=True``.

    Args:
        plan: what stays.
        model: the model that was traced, or one of the same structure; it is not changed.
        check: whether ``verify`` runs; without it the copy is not proven exact, and whether the model's own code can
            run is not tried.

    Returns:
        The compact copy: same class (or a ``RewrittenNetwork``), same mode, same ``requires_grad`` flags, smaller
        tensors.

    Raises:
        PlanError: if the plan does not fit the model; names the tensor.
        SurgeryError: if the compact model fails to run or computes something else; names the module.
    """
    if check:
        return cut(plan, model).model
    compact = sliced(plan, model)
    return in_rewritten_graph(plan, model, compact) if plan.code == "rewritten" else compact


@dataclass(frozen=True)
class Cut:
    """A compact network that is proven exact where its plan is.

    Args:
        model: the network.
        difference: the largest difference from the masked model's outputs, relative to the largest output. Rounding,
            or under an inexact plan what the removal changed beyond closing channels.
        plan: the plan, which says whose code runs the network.
    """

    model: nn.Module
    difference: float
    plan: PruningPlan


def cut(plan: PruningPlan, model: nn.Module, traced: Traced | None = None) -> Cut:
    """The verified compact copy of ``model``; see ``apply``.

    Args:
        plan: what stays.
        model: the full model.
        traced: its graphs; None = traced here where they are needed.
    """
    require_values(model)
    compact = sliced(plan, model)
    if not plan.exact:
        return cut_inexactly(plan, model, compact, traced)
    if plan.code == "rewritten":
        compact = in_rewritten_graph(plan, model, compact, traced)
        return Cut(compact, verify(plan, model, compact), plan)
    try:
        return Cut(compact, verify(plan, model, compact), replace(plan, code="own"))
    except SurgeryError as error:
        if plan.code == "own":
            raise
        try:
            compact = in_rewritten_graph(plan, model, compact, traced)
            return Cut(compact, verify(plan, model, compact), replace(plan, code="rewritten"))
        except SurgeryError as second:
            if str(second) == str(error):
                raise
            raise SurgeryError(f"{error}. Nor can its rewritten graph: {second}") from second


def cut_inexactly(plan: PruningPlan, model: nn.Module, compact: nn.Module, traced: Traced | None) -> Cut:
    """The compact network and its measured difference.

    The masked model cannot tell whether the model's own code cuts compact tensors in the right places. The rewritten
    graph can: it follows from the labels, and both must compute the same.
    """
    graph = in_rewritten_graph(plan, model, compact, traced)
    difference = verify(plan, model, graph)
    if plan.code != "rewritten":
        try:
            failure = f"{type(model).__name__} computes on fewer channels something else than its graph: they differ"
            prove_equal(plan, graph, compact, precisions_for(model), failure)
            return Cut(compact, difference, replace(plan, code="own"))
        except SurgeryError:
            if plan.code == "own":
                raise
    return Cut(graph, difference, replace(plan, code="rewritten"))


def in_rewritten_graph(
    plan: PruningPlan, model: nn.Module, compact: nn.Module, traced: Traced | None = None
) -> nn.Module:
    """The compact network as a rewritten graph, on the tensors of ``compact``."""
    try:
        return rewritten(plan, model, compact, traced)
    except (RewriteError, TraceError) as error:
        raise SurgeryError(f"the plan cannot be applied to {type(model).__name__}: {error}") from error
