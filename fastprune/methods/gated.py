"""What methods that train gates on a frozen network share: where gates are, and what the layers next to them cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class GatePlacement:
    """Where the gates are, and how a cost of the whole network reads as the ratio of what they control.

    The user's budget is a part of the whole network; the paper's p is a part of T, the cost of the layers next to
    gates. Only with r and p relative to T does λ weigh as much as in the paper: with full, T and limit in MACs,
    p = 1 − (full − limit)/T and r = 1 − (full − cost)/T.

    Args:
        index: units with a gate, int64 [n], ascending.
        num_units: U.
        prunable: T.
        full: cost of the whole network.
        limit: of the budget.
    """

    index: Tensor
    num_units: int
    prunable: float
    full: float
    limit: float

    @staticmethod
    def of(graph: ChannelGraph, budget: Budget, may_go: Tensor, device: torch.device) -> GatePlacement:
        """Gates on the units ``may_go``, bool [U]."""
        return GatePlacement(
            index=may_go.nonzero().flatten().to(device),
            num_units=graph.num_units,
            prunable=prunable_cost(graph, budget, may_go),
            full=float(budget.cost(graph)),
            limit=budget.limit(graph),
        )

    @property
    def target(self) -> float:
        """The p of eq. 9."""
        return 1 - (self.full - self.limit) / self.prunable

    def ratio(self, cost: Tensor) -> Tensor:
        """The r = T̂/T of a cost of the whole network."""
        return 1 - (self.full - cost) / self.prunable

    def spread(self, gates: Tensor) -> Tensor:
        """The flat vector [U] with ``gates`` [n] in their places and 1 elsewhere."""
        if len(gates) == self.num_units:
            return gates
        return gates.new_ones(self.num_units).index_copy(0, self.index, gates)


@contextmanager
def weights_frozen(model: nn.Module) -> Iterator[None]:
    """No gradient reaches the weights, so none is computed or stored for; the flags are put back afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
