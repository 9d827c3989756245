"""The units that a method's option ``groups`` lets go, and what the layers next to them cost."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune.budget import Budget
from fastprune.graph import ChannelGraph
from fastprune.graph.interior import interior_units


def gated_units(graph: ChannelGraph, groups: str) -> Tensor:
    """The units of an option ``groups``: "all", or "interior" for ``interior_units``; bool [U]."""
    return interior_units(graph) if groups == "interior" else torch.ones(graph.num_units, dtype=torch.bool)


def prunable_cost(graph: ChannelGraph, budget: Budget, units: Tensor) -> float:
    """The cost of the layers that some of ``units`` can make smaller, T_total of the papers.

    Args:
        graph: the network.
        budget: says which cost is meant.
        units: bool [U].

    Returns:
        MACs of all layers (or parameters of all tensors) that shrink with any of the units, in the full network. For
        ``interior_units`` these are the layers next to a gate: 3609 of ResNet-50's 4089 million MACs. A latency counts
        as a whole.
    """
    if budget.resource == "latency":
        return float(budget.cost(graph))
    model = budget.cost_model(graph)
    shrinking = {s.tensor for s in graph.slices if bool(units[s.units[s.units >= 0]].any())}
    elements = model.elements(graph.offsets.diff().double()).tolist()
    per_element = [term.params if budget.resource == "params" else term.macs for term in model.terms]
    parts = zip(model.terms, elements, per_element, strict=True)
    return float(sum(n * cost for term, n, cost in parts if term.tensor in shrinking))
