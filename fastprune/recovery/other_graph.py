"""A plan in the units of another channel graph of the same network."""

from __future__ import annotations

import torch

from fastprune.graph import ChannelGraph
from fastprune.graph.plan import PlanError, PruningPlan
from fastprune.graph.structure import belong_to, index_slices


def plan_in(graph: ChannelGraph, plan: PruningPlan) -> PruningPlan:
    """Return the plan that removes the same channels in a graph that was traced with other options.

    A plan made with ``ignore=``, or joined of two plans, has other units than the graph of the plain network.

    Raises:
        PlanError: if the units of the graph cannot say it; names the tensor.
    """
    theirs, own = index_slices(plan.slices), index_slices(graph.slices)
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    for place, piece in own.items():
        if place in theirs and len(theirs[place].units) == len(piece.units):
            closed = belong_to(theirs[place].units, ~plan.mask) & (piece.units >= 0)
            mask[piece.units[closed]] = False
    found = graph.plan(mask)
    for place, piece in theirs.items():
        kept = found.kept_indices(own[place]) if place in own else torch.arange(len(piece.units))
        if not torch.equal(kept, plan.kept_indices(piece)):
            raise PlanError(f"the plan removes channels of {piece.tensor!r} that this graph keeps; trace both alike")
    for place, piece in own.items():
        if place not in theirs and len(found.kept_indices(piece)) < len(piece.units):
            raise PlanError(f"the plan keeps channels of {piece.tensor!r} that this graph removes; trace both alike")
    return found
