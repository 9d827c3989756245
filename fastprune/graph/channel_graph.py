"""The channel graph: which channels of a network can only leave together, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastprune.graph.conventions import Flops, counted
from fastprune.graph.cost import Cost, CostModel
from fastprune.graph.export.tracing import Traced
from fastprune.graph.labels.propagate import Role
from fastprune.host.distributed import Distributed

if TYPE_CHECKING:
    from fastprune.graph.latency.model import LatencyModel
    from fastprune.graph.plan import PruningPlan


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
class ChannelGraph:
    """What ``trace`` finds out about a network.

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
    _latencies: dict[tuple[Any, ...], LatencyModel] = field(default_factory=dict, repr=False, compare=False)
    _counted: dict[str, CostModel] = field(default_factory=dict, repr=False, compare=False)

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

    def cost(self, mask: Tensor | None = None, *, flops: Flops = "mac") -> Cost:
        """MACs and parameters per sample, exact for 0/1 masks and differentiable for soft ones.

        Args:
            mask: flat mask [U] of any real or boolean dtype; None = the full network.
            flops: what counts as an operation: "mac", or one of the papers' conventions, see ``graph.conventions``.

        Returns:
            ``Cost`` of two float64 scalars.

        Raises:
            ValueError: if the mask has another shape.
        """
        return self.counted(flops)(torch.ones(self.num_units) if mask is None else mask)

    def counted(self, flops: Flops) -> CostModel:
        """The cost model in a convention, see ``graph.conventions``."""
        if flops not in self._counted:
            self._counted[flops] = counted(self, flops)
        return self._counted[flops]

    def latency(
        self,
        device: torch.device | str = "cpu",
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        *,
        channels_last: bool = False,
        cache: bool = True,
        peers: Distributed | None = None,
    ) -> LatencyModel:
        """Milliseconds of a forward pass under a mask, from operators measured here on a grid of widths.

        The first call for a network takes a minute or so; times are kept in the user's cache folder
        (``FASTPRUNE_CACHE`` names another one), by device, versions, threads, shapes and arguments.

        Args:
            device: where the network runs.
            batch: samples in a pass; height and width are those of the example.
            dtype: of parameters and inputs.
            channels_last: their memory layout.
            cache: False measures anew, and keeps nothing on disk.
            peers: processes that have to agree and all call this: the first one measures, and all take its times.

        Returns:
            ``LatencyModel``: call it with a flat mask [U].

        Raises:
            ValueError: for a batch below 1, or one that the network's code does not allow.
        """
        from fastprune.graph.latency.model import measure

        device = torch.device(device)
        if batch < 1:
            raise ValueError(f"batch {batch}: at least 1 sample is needed")
        key = (device, batch, dtype, channels_last, torch.get_num_threads())
        if key not in self._latencies or not cache:
            self._latencies[key] = measure(
                self, device, batch, dtype, channels_last=channels_last, cache=cache, peers=peers or Distributed()
            )
        return self._latencies[key]

    def plan(self, mask: Tensor) -> PruningPlan:
        """The plan that keeps the units where the flat ``mask`` [U] is 1.

        Raises:
            ValueError: if the mask has another shape, holds anything but 0 and 1, or empties a group.
        """
        from fastprune.graph.plan import PruningPlan

        return PruningPlan.from_mask(self, mask)

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
