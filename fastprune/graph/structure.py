"""The findings of a trace as plain data: slices, layers, groups, and their places in flat vectors over all units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastprune.graph.cost import CostModel
from fastprune.graph.export.tracing import Traced

Role = Literal["out", "in", "depthwise", "channel"]
NormKind = Literal["layer_norm", "rms_norm", "group_norm"]


def belong_to(units: Tensor, chosen: Tensor) -> Tensor:
    """Return which of ``units`` belong to the set ``chosen``, bool [U]; -1 belongs to no set."""
    return torch.cat([chosen, chosen.new_zeros(1)])[units]  # index -1 is the appended False


@dataclass(frozen=True)
class Slice:
    """One dimension of one parameter or buffer that shrinks with its units.

    Args:
        tensor: name in the model's state.
        dim: the dimension.
        units: the unit of each index, int64 [size(dim)]; -1 = always kept.
        role: "out" makes channels, "in" reads them, "depthwise" does both, "channel" has one value for each (batch
            norm, bias).
        computed: whether a layer's weight is computed from the tensor (weight standardisation), so that zeros in it do
            not close a channel.
    """

    tensor: str
    dim: int
    units: Tensor
    role: Role
    computed: bool = False

    @property
    def place(self) -> tuple[str, int]:
        """Its tensor and dimension."""
        return self.tensor, self.dim


def index_slices(slices: Iterable[Slice]) -> dict[tuple[str, int], Slice]:
    """Index slices by their place, {(tensor, dim): slice}."""
    return {piece.place: piece for piece in slices}


@dataclass(frozen=True)
class Layer:
    """One use of a convolution or linear layer.

    Args:
        name: the module's name.
        kind: the operator, "conv2d" say.
        weight: name of its weight.
        node: its node in the exported graph.
        in_units: the unit of each input channel, int64; -1 = always kept.
        out_units: the unit of each output channel.
        channel_dim: the dimension of its input that holds the channels.
        depthwise: whether each output channel reads its own input channel only.
        macs: multiply-accumulates per sample in the full network.
        positions: number of uses of each element of the weight per sample, the output pixels of a convolution.
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

    def reads(self, group: Group) -> bool:
        """Return whether the layer reads channels of ``group``."""
        return bool(group.holds(self.in_units).any())

    def makes(self, group: Group) -> bool:
        """Return whether the layer makes channels of ``group``."""
        return bool(group.holds(self.out_units).any())


@dataclass(frozen=True)
class HeldSize:
    """An attribute of a module that holds numbers of channels.

    Args:
        name: the module's name and the attribute's.
        counted: the units of each channel that a number counts, int64 [number, units that lie there]; -1 = always kept.
            One tensor for an integer, several for a sequence of integers.
    """

    name: str
    counted: tuple[Tensor, ...]

    @property
    def full(self) -> tuple[int, ...]:
        """The numbers in the full network."""
        return tuple(len(units) for units in self.counted)

    def under(self, mask: Tensor) -> tuple[int, ...]:
        """Return the numbers that are left where the flat ``mask`` [U] is True."""
        return tuple(int((~belong_to(units, ~mask)).any(1).sum()) for units in self.counted)


@dataclass(frozen=True)
class Norm:
    """A module that normalises over channels and loses some exactly: they count as zeros in its statistics.

    Args:
        module: the module's name.
        kind: what it computes; a "group_norm" has one group.
        dim: the dimension of its input that holds the channels; -1 = the last one.
        count: number of channels of its statistics: those of the network before any pruning.
        eps: what it adds to the variance; None = torch's default for RMS norms.
        units: the unit of each channel, int64; -1 = always kept.
    """

    module: str
    kind: NormKind
    dim: int
    count: int
    eps: float | None
    units: Tensor


@dataclass(frozen=True)
class LayerRow:
    """One line of ``GraphStructure.table``: the groups of a layer's output channels, or why they stay.

    Args:
        layer: the module's name.
        kind: the operator; "" if the layer is not understood or not reached.
        macs: multiply-accumulates per sample in the full network, over all its uses.
        groups: names of the groups that its output channels belong to.
        reason: why some or all of them always stay; None if none does.
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
        kind: "stream" if its channels pass a residual addition, else "plain".
        producers: layers that make its channels (depthwise ones left out).
        consumers: layers that read its channels (depthwise ones left out).
        layers: all layers that shrink with it.
        share: the fraction of the network's MACs that goes if the whole group goes.
        exact: whether all its units can be removed exactly.
    """

    name: str
    start: int
    size: int
    kind: Literal["plain", "stream"]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    layers: tuple[str, ...]
    share: float
    exact: bool = True

    @property
    def units(self) -> slice:
        """Its part of a flat vector."""
        return slice(self.start, self.start + self.size)

    def holds(self, units: Tensor) -> Tensor:
        """Return which of ``units`` belong to the group, a bool for each."""
        return (units >= self.start) & (units < self.start + self.size)


@dataclass(frozen=True)
class GraphStructure:
    """The channel groups of a network, and the tensors and layers that they touch.

    All values per unit are one flat vector over the units of all groups: group g's part is
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
        inexact_units: whether the removal of a unit changes statistics that normalise others, bool [U].
        inexact: the operators that compute these statistics, with their modules.
        held_sizes: attributes of the model's own code that hold numbers of channels, see ``graph.held_sizes``.
        norms: norms over channels that lose some exactly, see ``graph.norms``.
        heads: whether whole heads of attention may leave.
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
    held_sizes: tuple[HeldSize, ...] = ()
    norms: tuple[Norm, ...] = ()
    heads: bool = False

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
        """The device of the traced network."""
        tensors = (*self.traced.evaluation.parameters(), *self.traced.evaluation.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def group_of_unit(self) -> Tensor:
        """The group of each unit, int64 [U]."""
        return torch.repeat_interleave(torch.arange(len(self.groups)), self.offsets.diff())

    def table(self) -> list[LayerRow]:
        """Return every convolution and linear layer with its groups, or with the reason why its channels stay."""
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
        """Return the slices of parameters and buffers in which units of ``group`` have one of ``roles``."""
        return [piece for piece in self.slices if piece.role in roles and bool(group.holds(piece.units).any())]
