"""Resources: the costs that a budget can limit, how each is counted or measured, and how its numbers read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.graph.conventions import Flops
from fastprune.graph.cost import CostModel
from fastprune.host.distributed import Distributed


class BudgetError(ValueError):
    """A budget that is malformed or cannot be met."""


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a latency counts: one forward pass in eval mode.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None = where the network is.
        batch: images per pass.
        dtype: "float32", "bfloat16" or "float16".
        channels_last: whether the memory layout is NHWC.
        modelled: whether the modelled time alone counts, so that plans repeat exactly. Otherwise the compact network is
            timed too, and the plan is corrected where it misses the budget.
    """

    device: str | None = None
    batch: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    modelled: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise BudgetError(f"latency: a batch of at least 1 image is needed, got {self.batch}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise BudgetError(f"latency: dtype {self.dtype!r} is none of float32, bfloat16, float16")


class Meter(Protocol):
    """The cost of a network as a function of the channels that stay."""

    def __call__(self, mask: Tensor) -> Tensor:
        """The cost under a flat mask [U], 0/1 or soft; a float64 scalar, differentiable in the mask."""

    def of_widths(self, kept: Tensor) -> Tensor:
        """The cost for numbers of kept units per group, float64 [..., G] -> [...]."""


class Resource(ABC):
    """A cost that a budget can limit.

    Attributes:
        name: the word before the number in a budget.
        metric: the cost's name in the metrics of a run; "" if they do not have it.
        grows: whether the cost grows with every unit. A latency does not: 65 channels may take longer than 80.
        is_time: whether the cost is a time, which can also be measured on the networks themselves.
        unit: the unit of an absolute value.
        suffixes: {suffix of a number: its factor}; upper and lower case are the same.
        smallest: the smallest absolute value of a budget.
        rule: the rule for absolute values, for error messages.
    """

    name: str
    metric: str
    grows: ClassVar[bool]
    is_time: ClassVar[bool]
    unit: ClassVar[str]
    suffixes: ClassVar[Mapping[str, float]]
    smallest: ClassVar[float]
    rule: ClassVar[str]

    def parse(self, number: str, suffix: str) -> tuple[float, bool]:
        """Return the value of a budget, and whether it is absolute.

        Raises:
            ValueError: for a malformed number, an unknown suffix or a value out of range.
        """
        factors = {name.lower(): factor for name, factor in self.suffixes.items()}
        if suffix and suffix.lower() not in factors:
            raise ValueError(f"the unit {suffix!r} is none of {', '.join(self.suffixes)}")
        try:
            value = float(number) * factors.get(suffix.lower(), 1.0)
        except ValueError:
            raise ValueError(f"{number!r} is not a number") from None
        absolute = self.is_absolute(value, suffix)
        if not 0 < value < float("inf") or (value < self.smallest if absolute else value > 1):
            raise ValueError(f"the fraction to keep must be in (0, 1]; {self.rule}")
        return value, absolute

    @abstractmethod
    def is_absolute(self, value: float, suffix: str) -> bool:
        """Return whether a number with this suffix is an absolute value."""

    @abstractmethod
    def describe(self, cost: float) -> str:
        """Return a cost as people read it."""

    @abstractmethod
    def meter(self, graph: ChannelGraph, conditions: Conditions, peers: Distributed | None) -> Meter:
        """Return the meter of a network; ``peers`` are processes that have to agree on it and all call this."""

    @abstractmethod
    def tensor_costs(self, graph: ChannelGraph, mask: Tensor) -> list[tuple[str, float]] | None:
        """Return (tensor, cost) pairs that add up under a mask [U]; None if the cost is no sum over tensors."""

    @abstractmethod
    def settings(self, conditions: Conditions) -> dict[str, Any]:
        """Return the conditions that the cost depends on, as options of the command line."""


class Count(Resource):
    """MACs or parameters, which the channel graph counts exactly.

    Args:
        name: the word before the number in a budget.
        convention: the convention in which MACs are counted.
        params: whether parameters are meant, which are the same in every convention.
    """

    grows = True
    is_time = False
    unit = ""
    suffixes: ClassVar[Mapping[str, float]] = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    smallest = 1000.0  # a plain number between 1 and this is more likely a slip than a budget
    rule = f"an absolute number of MACs or parameters must be at least {smallest:.0f}"

    def __init__(self, name: str, convention: Flops = "mac", *, params: bool = False) -> None:
        self.name = name
        self.convention: Flops = convention
        self.params = params
        self.metric = "params" if params else "macs" if convention == "mac" else ""

    def is_absolute(self, value: float, suffix: str) -> bool:
        """Return whether the value is above 1."""
        return value > 1

    def describe(self, cost: float) -> str:
        """Return the count without decimals."""
        return f"{cost:.0f}"

    def meter(self, graph: ChannelGraph, conditions: Conditions, peers: Distributed | None) -> Meter:
        """Return the count as a meter; conditions and peers do not matter."""
        return CountMeter(graph.counted(self.convention), self.params)

    def tensor_costs(self, graph: ChannelGraph, mask: Tensor) -> list[tuple[str, float]]:
        """Return (tensor, count) for all terms of the cost."""
        model = graph.counted(self.convention)
        elements = model.elements(model.kept(mask)).tolist()
        counts = [term.params if self.params else term.macs for term in model.terms]
        return [(term.tensor, n * count) for term, n, count in zip(model.terms, elements, counts, strict=True)]

    def settings(self, conditions: Conditions) -> dict[str, Any]:
        """Return nothing: a count depends on no conditions."""
        return {}


class Latency(Resource):
    """Milliseconds of a forward pass, as ``ChannelGraph.latency`` models them from measurements."""

    name = "latency"
    metric = "ms"
    grows = False
    is_time = True
    unit = "ms"
    suffixes: ClassVar[Mapping[str, float]] = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    smallest = 0.0
    rule = "a time must be above 0 and have a unit (12ms)"

    def is_absolute(self, value: float, suffix: str) -> bool:
        """Return whether the number has a unit."""
        return bool(suffix)

    def describe(self, cost: float) -> str:
        """Return the time with its unit."""
        return f"{cost:.3f} ms"

    def meter(self, graph: ChannelGraph, conditions: Conditions, peers: Distributed | None) -> Meter:
        """Return the latency model under the conditions."""
        return graph.latency(
            conditions.device or graph.device,
            batch=conditions.batch,
            dtype=getattr(torch, conditions.dtype),
            channels_last=conditions.channels_last,
            peers=peers,
        )

    def tensor_costs(self, graph: ChannelGraph, mask: Tensor) -> None:
        """Return None: the time of an operator depends on several tensors."""

    def settings(self, conditions: Conditions) -> dict[str, Any]:
        """Return ``latency_device``, ``latency_batch``, …."""
        return {f"latency_{name}": value for name, value in asdict(conditions).items()}


@dataclass(frozen=True)
class CountMeter:
    """A count as a meter.

    Args:
        model: the model that counts.
        params: whether parameters are meant, or MACs.
    """

    model: CostModel
    params: bool

    def __call__(self, mask: Tensor) -> Tensor:
        """The count under a flat mask [U]."""
        return self.of_widths(self.model.kept(mask))

    def of_widths(self, kept: Tensor) -> Tensor:
        """The count for numbers of kept units per group."""
        cost = self.model.of_widths(kept)
        return cost.params if self.params else cost.macs


ResourceName = Literal["flops", "params", "latency", "eq8", "auth"]

RESOURCES: Mapping[str, Resource] = {
    resource.name: resource
    for resource in (
        Count("flops"), Count("params", params=True), Latency(), Count("eq8", "eq8"), Count("auth", "auth"),
    )
}  # fmt: skip
