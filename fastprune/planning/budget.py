"""Budgets: what a pruned network may cost."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.graph.conventions import Flops
from fastprune.graph.cost import CostModel
from fastprune.host.distributed import Distributed
from fastprune.planning.lineage import InFirst, Lineage

Resource = Literal["flops", "params", "latency", "eq8", "auth"]

SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
TOLERANCE = 0.01  # of the full cost: how far below the budget a plan may be
SMALLEST_ABSOLUTE = 1000.0  # a plain number between 1 and this is more likely a slip than a budget


class BudgetError(ValueError):
    """A budget that is malformed or cannot be met."""


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a latency counts: one forward pass in eval mode.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None = where the network is.
        batch: images per pass.
        dtype: "float32", "bfloat16" or "float16".
        channels_last: NHWC memory layout.
    """

    device: str | None = None
    batch: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise BudgetError(f"latency: a batch of at least 1 image is needed, got {self.batch}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise BudgetError(f"latency: dtype {self.dtype!r} is none of float32, bfloat16, float16")


class Meter(Protocol):
    """What a network costs when only some channels stay."""

    def __call__(self, mask: Tensor) -> Tensor:
        """The cost under a flat mask [U], 0/1 or soft; a float64 scalar, differentiable in the mask."""

    def of_widths(self, kept: Tensor) -> Tensor:
        """The cost for numbers of kept units per group, float64 [..., G] -> [...]."""


@dataclass(frozen=True)
class _Counter:
    """MACs or parameters as a meter."""

    model: CostModel
    params: bool

    def __call__(self, mask: Tensor) -> Tensor:
        return self.of_widths(self.model.kept(mask))

    def of_widths(self, kept: Tensor) -> Tensor:
        cost = self.model.of_widths(kept)
        return cost.params if self.params else cost.macs


@dataclass(frozen=True)
class _InFirst:
    """The cost of a network that came from another one, as a meter of that one counts it."""

    lineage: InFirst
    model: CostModel
    first: Meter

    def __call__(self, mask: Tensor) -> Tensor:
        return self.of_widths(self.model.kept(mask))

    def of_widths(self, kept: Tensor) -> Tensor:
        return self.first.of_widths(self.lineage.widths(kept))


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
        conditions: of a latency.
        lineage: where the network came from; its cost and the fraction are then those of the channels in that network.
    """

    resource: Resource
    value: float
    absolute: bool | None = None
    conditions: Conditions = field(default_factory=Conditions)
    lineage: Lineage | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "absolute", self.value > 1 if self.absolute is None else self.absolute)

    @staticmethod
    def parse(text: str, conditions: Conditions | None = None) -> Budget:
        """Read a budget.

        Args:
            text: ``flops=0.5``, ``params=0.3``, ``latency=0.6``, ``flops=2G``, ``params=1.5M`` (suffixes K, M, G, T),
                ``latency=12ms`` (us, ms, s), ``auth=0.5``.
            conditions: of a latency.

        Raises:
            BudgetError: if the text is no budget; says what is needed.

        Example:
            >>> Budget.parse("flops=0.5").value, Budget.parse("flops=2G").value, Budget.parse("latency=12ms").value
            (0.5, 2000000000.0, 12.0)
        """
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Z]*)\s*", text, re.IGNORECASE)
        resource = found.group(1).lower() if found else ""
        if found is None or resource not in get_args(Resource):
            raise BudgetError(
                f"budget {text!r}: 'flops=…', 'params=…' or 'latency=…' is needed, "
                "with a fraction or an absolute number (flops=0.5, flops=2G, latency=12ms)"
            )
        unit = found.group(3)
        factor = MILLISECONDS.get(unit.lower()) if resource == "latency" else SUFFIXES.get(unit.upper())
        if factor is None and unit:
            known = MILLISECONDS if resource == "latency" else SUFFIXES
            raise BudgetError(f"budget {text!r}: the unit {unit!r} is none of {', '.join(filter(None, known))}")
        try:
            value = float(found.group(2)) * (factor or 1.0)
        except ValueError:
            raise BudgetError(f"budget {text!r}: {found.group(2)!r} is not a number") from None
        absolute = bool(unit) if resource == "latency" else value > 1
        least = 0.0 if resource == "latency" else SMALLEST_ABSOLUTE
        if not 0 < value < float("inf") or (value < least if absolute else value > 1):
            needed = f"an absolute number of MACs or parameters must be at least {SMALLEST_ABSOLUTE:.0f}"
            if resource == "latency":
                needed = "a time must be above 0 and have a unit (12ms)"
            raise BudgetError(f"budget {text!r}: the fraction to keep must be in (0, 1]; {needed}")
        return Budget(cast("Resource", resource), value, absolute, conditions or Conditions())

    def __str__(self) -> str:
        return f"{self.resource}={self.value:g}{self._unit}"

    @property
    def text(self) -> str:
        """What ``parse`` reads as this budget, to the last digit."""
        return f"{self.resource}={self.value!r}{self._unit}"

    @property
    def _unit(self) -> str:
        return "ms" if self.resource == "latency" and self.absolute else ""

    def cost_model(self, graph: ChannelGraph) -> CostModel:
        """The count behind a budget of MACs or parameters."""
        return graph.counted(cast("Flops", self.resource) if self.resource in get_args(Flops) else "mac")

    def meter(self, graph: ChannelGraph, peers: Distributed | None = None) -> Meter:
        """The cost that the budget limits, as a function of masks or widths: MACs, parameters or milliseconds.

        Args:
            graph: the network.
            peers: at the first call processes that have to agree on a latency, which all make it.
        """
        if self.lineage is not None:
            first = replace(self, lineage=None).meter(self.lineage.first, peers)
            return _InFirst(self.lineage.in_first(graph), graph.cost_model, first)
        if self.resource != "latency":
            return _Counter(self.cost_model(graph), self.resource == "params")
        c = self.conditions
        return graph.latency(
            c.device or graph.device, batch=c.batch, dtype=getattr(torch, c.dtype), channels_last=c.channels_last,
            peers=peers,
        )  # fmt: skip

    def cost(self, graph: ChannelGraph, mask: Tensor | None = None) -> Tensor:
        """The cost that the budget limits, under a flat mask [U] (None = of the full network)."""
        return self.meter(graph)(torch.ones(graph.num_units) if mask is None else mask)

    def limit(self, graph: ChannelGraph) -> float:
        """The largest allowed cost, in MACs, parameters or milliseconds.

        Raises:
            BudgetError: if the full network is within the budget already, so that there is nothing to prune.
        """
        total = float(self.cost(graph))
        whole = total if self.lineage is None else float(replace(self, lineage=None).cost(self.lineage.first))
        limit = self.value if self.absolute else self.value * whole
        if total == 0:
            raise BudgetError(f"budget '{self}': nothing in this network counts (no layer lies next to a gate)")
        if limit >= total:
            size = f"{total:.3f} ms" if self.resource == "latency" else f"{total:.0f}"
            raise BudgetError(f"budget '{self}': the full network costs {size}, so there is nothing to prune")
        return limit

    def largest_layers(self, graph: ChannelGraph, mask: Tensor, count: int = 3) -> list[tuple[str, float]]:
        """The layers that cost most under a mask [U], with their parts of the whole; empty for a latency."""
        if self.resource == "latency":
            return []
        model = self.cost_model(graph)
        costs: Counter[str] = Counter()
        for term, elements in zip(model.terms, model.elements(model.kept(mask)).tolist(), strict=True):
            name = term.tensor.rpartition(".")[0] or term.tensor.partition(" ")[0]
            costs[name] += elements * (term.params if self.resource == "params" else term.macs)
        total = max(1.0, float(self.cost(graph, mask)))
        return [(name, cost / total) for name, cost in costs.most_common(count)]
