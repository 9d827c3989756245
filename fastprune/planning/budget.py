"""Budgets: what a pruned network may cost."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.graph.cost import CostModel
from fastprune.host.distributed import Distributed
from fastprune.planning.lineage import InFirst, Lineage
from fastprune.planning.resources import RESOURCES, BudgetError, Conditions, Meter, Resource, ResourceName

__all__ = ["TOLERANCE", "Budget", "BudgetError", "Conditions"]

ALIASES = {"macs": "flops"}  # names of resources that people use
TOLERANCE = 0.01  # of the full cost: how far below the budget a plan may be


@dataclass(frozen=True)
class Budget:
    """An upper limit on what the pruned network costs.

    Args:
        resource: "flops" (multiply-accumulates of convolutions and linear layers, the papers' count), "params",
            "latency" (of a forward pass, as ``ChannelGraph.latency`` models it from measurements), or FLOPs counted as
            in the papers of Gao et al., "eq8" and "auth" (see ``graph.conventions``).
        value: the fraction of the full network's cost that may stay, in (0, 1], or an absolute number: MACs,
            parameters, milliseconds.
        absolute: whether ``value`` is an absolute number; None = if it is above 1.
        conditions: the conditions of a latency.
        lineage: the origin of the network; cost and fraction are then those of the channels in the first network.

    Raises:
        BudgetError: for an unknown resource.
    """

    resource: ResourceName
    value: float
    absolute: bool | None = None
    conditions: Conditions = field(default_factory=Conditions)
    lineage: Lineage | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.resource not in RESOURCES:
            raise BudgetError(f"budget: the resource {self.resource!r} is none of {', '.join(RESOURCES)}")
        object.__setattr__(self, "absolute", self.value > 1 if self.absolute is None else self.absolute)

    @staticmethod
    def parse(text: str, conditions: Conditions | None = None) -> Budget:
        """Read a budget.

        Args:
            text: ``flops=0.5``, ``params=0.3``, ``latency=0.6``, ``flops=2G``, ``params=1.5M`` (suffixes K, M, G, T),
                ``latency=12ms`` (us, ms, s), ``auth=0.5``. ``macs`` is another name of ``flops``, which is meant if
                none is given (``0.5``); a fraction may be in per cent (``50%``, ``params=30%``).
            conditions: the conditions of a latency.

        Raises:
            BudgetError: if the text is no budget; says what is needed.

        Example:
            >>> Budget.parse("flops=0.5").value, Budget.parse("flops=2G").value, Budget.parse("latency=12ms").value
            (0.5, 2000000000.0, 12.0)
        """
        found = re.fullmatch(r"\s*(?:(\w+)\s*=)?\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Z]*|%)\s*", text, re.IGNORECASE)
        resource = (found.group(1) or "flops").lower() if found else ""
        resource = ALIASES.get(resource, resource)
        if found is None or resource not in RESOURCES:
            raise BudgetError(
                f"budget {text!r}: 'flops=…', 'params=…' or 'latency=…' is needed, "
                "with a fraction or an absolute number (flops=0.5, flops=2G, latency=12ms)"
            )
        number, suffix = found.group(2), found.group(3)
        try:
            if suffix == "%":
                number, suffix = percent(number), ""
            value, absolute = RESOURCES[resource].parse(number, suffix)
        except ValueError as error:
            raise BudgetError(f"budget {text!r}: {error}") from None
        return Budget(cast("ResourceName", resource), value, absolute, conditions or Conditions())

    @staticmethod
    def of(budget: object) -> Budget:
        """Return what a user gives as a budget: a ``Budget``, the text of one, or a fraction of the FLOPs.

        Raises:
            BudgetError: if it is none of them, or no budget that ``parse`` reads.

        Example:
            >>> Budget.of(0.5) == Budget.of("50%") == Budget.of("macs=0.5") == Budget("flops", 0.5)
            True
        """
        if isinstance(budget, Budget):
            return budget
        if isinstance(budget, (int, float)) and not isinstance(budget, bool):
            return Budget.parse(f"flops={float(budget)!r}")
        if isinstance(budget, str):
            return Budget.parse(budget)
        raise BudgetError(
            f"budget: got {type(budget).__name__}; a fraction of the FLOPs (0.5), a text ('params=0.3') or a Budget is "
            "needed"
        )

    def __str__(self) -> str:
        return f"{self.resource}={self.value:g}{self._unit}"

    @property
    def text(self) -> str:
        """The text that ``parse`` reads as this budget, to the last digit."""
        return f"{self.resource}={self.value!r}{self._unit}"

    @property
    def _unit(self) -> str:
        return self._resource.unit if self.absolute else ""

    @property
    def _resource(self) -> Resource:
        return RESOURCES[self.resource]

    @property
    def metric(self) -> str:
        """The cost's name in the metrics of a run; "" if they do not have it."""
        return self._resource.metric

    @property
    def grows(self) -> bool:
        """Whether the cost grows with every unit."""
        return self._resource.grows

    @property
    def is_time(self) -> bool:
        """Whether the cost is a time, which can also be measured on the networks themselves."""
        return self._resource.is_time

    @property
    def condition_settings(self) -> dict[str, Any]:
        """The conditions that the cost depends on, as options of the command line."""
        return self._resource.settings(self.conditions)

    def under(self, conditions: Conditions | None, device: torch.device) -> Budget:
        """Return the same budget under conditions.

        Args:
            conditions: the new conditions; None = those that it has.
            device: the device of a latency for which the conditions name none.

        Raises:
            ValueError: for conditions of a cost that depends on none.
        """
        if conditions is not None and conditions != Conditions() and not self.condition_settings:
            raise ValueError(f"conditions apply to latency budgets only; got {str(self)!r}")
        chosen = conditions or self.conditions
        return replace(self, conditions=replace(chosen, device=chosen.device or str(device)))

    def meter(self, graph: ChannelGraph, peers: Distributed | None = None) -> Meter:
        """Return the cost that the budget limits, as a function of masks or widths: MACs, parameters or milliseconds.

        Args:
            graph: the network.
            peers: processes that have to agree on a latency; all make the first call.
        """
        if self.lineage is not None:
            first = replace(self, lineage=None).meter(self.lineage.first, peers)
            return InFirstMeter(self.lineage.in_first(graph), graph.cost_model, first)
        return self._resource.meter(graph, self.conditions, peers)

    def cost(self, graph: ChannelGraph, mask: Tensor | None = None) -> Tensor:
        """Return the cost that the budget limits, under a flat mask [U] (None = the full network)."""
        return self.meter(graph)(torch.ones(graph.num_units) if mask is None else mask)

    def limit(self, graph: ChannelGraph) -> float:
        """Return the largest allowed cost, in MACs, parameters or milliseconds.

        Raises:
            BudgetError: if the full network is within the budget already, so that there is nothing to prune.
        """
        total = float(self.cost(graph))
        whole = total if self.lineage is None else float(replace(self, lineage=None).cost(self.lineage.first))
        limit = self.value if self.absolute else self.value * whole
        if total == 0:
            raise BudgetError(f"budget '{self}': nothing in this network counts (no layer lies next to a gate)")
        if limit >= total:
            size = self._resource.describe(total)
            raise BudgetError(f"budget '{self}': the full network costs {size}, so there is nothing to prune")
        return limit

    def tensor_costs(self, graph: ChannelGraph, mask: Tensor | None = None) -> list[tuple[str, float]] | None:
        """Return (tensor, cost) pairs that add up under a flat mask [U] (None = the full network).

        None in place of the pairs if the cost is no sum over tensors.
        """
        return self._resource.tensor_costs(graph, torch.ones(graph.num_units) if mask is None else mask)

    def largest_layers(self, graph: ChannelGraph, mask: Tensor, count: int = 3) -> list[tuple[str, float]]:
        """Return the layers that cost most under a mask [U], with their parts of the whole; none for a latency."""
        tensor_costs = self.tensor_costs(graph, mask)
        if tensor_costs is None:
            return []
        costs: defaultdict[str, float] = defaultdict(float)
        for tensor, cost in tensor_costs:
            costs[tensor.rpartition(".")[0] or tensor.partition(" ")[0]] += cost
        total = max(1.0, float(self.cost(graph, mask)))
        largest = sorted(costs, key=lambda name: costs[name], reverse=True)[:count]
        return [(name, costs[name] / total) for name in largest]


def percent(number: str) -> str:
    """Return the fraction, as text, of a number in per cent.

    Raises:
        ValueError: for a malformed number, or one above 100.
    """
    try:
        fraction = float(number) / 100
    except ValueError:
        raise ValueError(f"{number!r} is not a number") from None
    if fraction > 1:
        raise ValueError(f"{number}% is more than the whole network; at most 100% is needed")
    return repr(fraction)


@dataclass(frozen=True)
class InFirstMeter:
    """The cost of a network that came from another one, as a meter of that one counts it.

    Args:
        lineage: the widths in the first network.
        model: a cost model of the network.
        first: a meter of the first network.
    """

    lineage: InFirst
    model: CostModel
    first: Meter

    def __call__(self, mask: Tensor) -> Tensor:
        """The cost under a flat mask [U]."""
        return self.of_widths(self.model.kept(mask))

    def of_widths(self, kept: Tensor) -> Tensor:
        """The cost for numbers of kept units per group."""
        return self.first.of_widths(self.lineage.widths(kept))
