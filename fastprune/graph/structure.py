"""What tracing found out about a network, as plain data: slices, layers, groups, and where they lie in flat vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastprune.graph.cost import CostModel
from fastprune.graph.export.tracing import Traced

Role = Literal["out", "in", "depthwise", "channel"]


@dataclass(frozen=True)
class Slice:
    """One dimension of one parameter or buffer that shrinks with its units.

    Args:
        tensor: name in the model's state.
        dim: the dimension.
        units: the unit of each index, int64 [size(dim)]; -1 = always kept.
        role: "out" makes channels, "in" reads them, "depthwise" does both, "channel" goes along (batch norm, bias).
        computed: whether a layer's weight is computed from the tensor (weight standardisation), so that zeros in it do
            not close a channel.
    """

    tensor: str
    dim: int
    units: Tensor
    role: Role
    computed: bool = False


@dataclass(frozen=True)
class Layer:
    """One use of a convolution or linear layer.

    Args:
        name: the module's name.
        kind: the operator, "conv2d" say.
        weight: name of its weight.
        node: its node in the exported graph.
        in_units: the unit of each channel that it reads, int64; -1 = always kept.
        out_units: the unit of each channel that it makes.
        channel_dim: the dimension of its input that holds the channels.
        depthwise: whether each output channel reads its own input channel only.
        macs: multiply-accumulates per sample in the full network.
        positions: how often each element of the weight is used per sample, the output pixels of a convolution.
    """

    name: str
    kind: str
    weight: str
    node: str
    in_units: Tensor
    out_units: Tensor
    channel_dim: int
    depthwise: bool
    macs: int
    positions: int


@dataclass(frozen=True)
class LayerRow:
    """What becomes of a layer's output channels.

    Args:
        layer: the module's name.
        kind: the operator; "" where the layer is not understood or not reached.
        macs: multiply-accumulates per sample in the full network, over all its uses.
        groups: names of the groups that its output channels belong to.
        reason: why some or all of them always stay; None where none does.
    """

    layer: str
    kind: str
    macs: int
    groups: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True)
class Group:
    """Units that touch the same dimensions of the same parameters: the channels of one tensor, say.

    Args:
        name: the first layer that makes its channels.
        start: index of its first unit in the flat vector.
        size: number of units.
        kind: "stream" where its channels pass a residual addition, "interior" elsewhere.
        producers: layers that make its channels (depthwise ones left out).
        consumers: layers that read its channels (depthwise ones left out).
        layers: all layers that shrink with it.
        share: the part of the network's MACs that goes if the whole group goes.
        exact: whether all its units can be removed exactly.
    """

    name: str
    start: int
    size: int
    kind: Literal["interior", "stream"]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    layers: tuple[str, ...]
    share: float
    exact: bool = True

    @property
    def units(self) -> slice:
        """Its part of a flat vector."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class GraphStructure:
    """The channel groups of a network, and the tensors and layers that they touch.

    Everything that is per unit is one flat vector over all units of all groups: group g's part is
    ``vector[offsets[g]:offsets[g + 1]]``.

    Args:
        groups: the groups, in the order of the network.
        offsets: int64 [G+1].
        slices: every tensor dimension that shrinks.
        layers: every use of a convolution or linear layer, in the order of execution.
        unprunable: (layer, reason) for every layer with output channels that always stay.
        cost_model: MACs and parameters under a mask.
        traced: the exported graphs.
        rewrites: whether plans may need the network's graph rewritten; see ``trace``.
        inexact_units: whether the removal of a unit changes statistics that others are normalised by, bool [U].
        inexact: the operators that compute these statistics, with their modules.
    """

    groups: tuple[Group, ...]
    offsets: Tensor
    slices: tuple[Slice, ...]
    layers: tuple[Layer, ...]
    unprunable: tuple[tuple[str, str], ...]
    cost_model: CostModel = field(repr=False)
    traced: Traced = field(repr=False)
    rewrites: bool
    inexact_units: Tensor
    inexact: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every unit can be removed exactly."""
        return not bool(self.inexact_units.any())

    @property
    def num_units(self) -> int:
        """Number of units, the length of every flat vector."""
        return int(self.offsets[-1])

    @property
    def device(self) -> torch.device:
        """Where the traced network is."""
        tensors = (*self.traced.evaluation.parameters(), *self.traced.evaluation.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def group_of_unit(self) -> Tensor:
        """The group of each unit, int64 [U]."""
        return torch.repeat_interleave(torch.arange(len(self.groups)), self.offsets.diff())

    def table(self) -> list[LayerRow]:
        """Every convolution and linear layer, with its groups or the reason why its channels stay."""
        reasons = dict(self.unprunable)
        rows: dict[str, LayerRow] = {}
        for layer in self.layers:
            groups = self.group_of_unit[layer.out_units[layer.out_units >= 0]].unique().tolist()
            names = tuple(self.groups[g].name for g in groups)
            uses = rows[layer.name].macs if layer.name in rows else 0
            reason = reasons.pop(layer.name, rows[layer.name].reason if layer.name in rows else None)
            rows[layer.name] = LayerRow(layer.name, layer.kind, uses + layer.macs, names, reason)
        return [*rows.values(), *(LayerRow(name, "", 0, (), reason) for name, reason in reasons.items())]

    def weights_of_group(self, group: Group, roles: Sequence[Role]) -> list[Slice]:
        """The slices of parameters and buffers in which units of ``group`` have one of ``roles``."""
        first, last = group.start, group.start + group.size
        inside = [bool(((s.units >= first) & (s.units < last)).any()) for s in self.slices]
        return [s for s, touched in zip(self.slices, inside, strict=True) if touched and s.role in roles]
