"""From units to the plain data of a ``ChannelGraph``: its slices, layers, cost and groups."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.graph.cost import CostModel, SlicedDim, terms_of
from fastprune.graph.labels.labels import IntArray
from fastprune.graph.labels.propagate import LabelledDim, Propagation
from fastprune.graph.structure import Group, Layer, Slice
from fastprune.graph.units import Units

Shapes = dict[str, tuple[int, ...]]


def weight_shapes(model: nn.Module, state: Propagation) -> tuple[Shapes, Shapes]:
    """Return the shapes of all parameters, and of the buffers that layers use as weights."""
    buffers = dict(model.named_buffers())
    used = {c.weight: tuple(buffers[c.weight].shape) for c in state.calls if c.weight in buffers}
    return {name: tuple(p.shape) for name, p in model.named_parameters()}, used


def describe_slices(units: Units, dims: list[LabelledDim]) -> tuple[Slice, ...]:
    """Return the labelled dimensions that hold units."""
    return tuple(
        Slice(d.tensor, d.dim, torch.from_numpy(found), d.role, d.computed)
        for d in dims
        if (found := units.find(d.labels)).max(initial=-1) >= 0
    )


def describe_layers(units: Units, state: Propagation, shapes: Shapes) -> tuple[Layer, ...]:
    """Return all uses of layers; ``shapes`` are those of their weights."""
    return tuple(
        Layer(
            name=c.layer,
            kind=c.kind,
            weight=c.weight,
            node=c.node,
            in_units=torch.from_numpy(units.find(c.in_labels)),
            out_units=torch.from_numpy(units.find(c.out_labels)),
            channel_dim=c.channel_dim,
            depthwise=c.depthwise,
            macs=c.positions * int(np.prod(shapes[c.weight])),
            positions=c.positions,
        )
        for c in state.calls
    )


def describe_cost(
    units: Units, state: Propagation, slices: tuple[Slice, ...], parameters: Shapes, buffers: Shapes
) -> CostModel:
    """Return the cost model of a network.

    Args:
        units: the units.
        state: the findings about its layers.
        slices: its slices.
        parameters: the shapes of its parameters.
        buffers: the shapes of the buffers that layers use as weights.
    """
    positions: dict[str, int] = {}
    for call in state.calls:
        positions[call.weight] = positions.get(call.weight, 0) + call.positions
    # Kernels that run along channels count like filters, one for each channel.
    repeats = {f"{r.node} (node)": (len(r.labels), r.macs) for r in state.repeats}
    repeated = tuple(
        Slice(name, 0, torch.from_numpy(units.find(r.labels)), "channel")
        for name, r in zip(repeats, state.repeats, strict=True)
    )
    uncounted = buffers | repeats
    dims = sliced_dims((*slices, *repeated), units.offsets, parameters | uncounted)
    uses = positions | dict.fromkeys(repeats, 1)
    terms = terms_of(parameters, dims, uses, counted=True) + terms_of(uncounted, dims, uses, counted=False)
    return CostModel(torch.from_numpy(units.offsets), terms, dims, state.fixed_macs)


def sliced_dims(slices: tuple[Slice, ...], offsets: IntArray, shapes: Shapes) -> list[SlicedDim]:
    """Return the sizes of parameters' dimensions as functions of the groups' kept units."""
    dims = []
    for s in slices:
        if s.tensor in shapes:
            units = s.units.numpy()
            held = np.searchsorted(offsets, units[units >= 0], side="right") - 1
            groups, indices = np.unique(held, return_counts=True)
            counts = {int(g): int(n) // int(offsets[g + 1] - offsets[g]) for g, n in zip(groups, indices, strict=True)}
            dims.append(SlicedDim(s.tensor, s.dim, len(units), int((units < 0).sum()), counts))
    return dims


def describe_groups(
    units: Units, slices: tuple[Slice, ...], cost: CostModel, state: Propagation, inexact_units: Tensor
) -> tuple[Group, ...]:
    """Return the groups, each with its name and the layers that make and read its channels."""
    offsets = units.offsets
    num_groups = len(offsets) - 1
    producers: list[dict[str, None]] = [{} for _ in range(num_groups)]
    consumers: list[dict[str, None]] = [{} for _ in range(num_groups)]
    touched: list[dict[str, None]] = [{} for _ in range(num_groups)]
    lists = {"out": producers, "in": consumers}
    for s in slices:
        for g in units.groups_of(s.units.numpy()):
            layer = s.tensor.rpartition(".")[0]
            touched[g][layer] = None
            if s.role in lists:
                lists[s.role][g][layer] = None
    streams = {g for added in state.added for g in units.groups_of(units.find(added))}
    share = shares_of_macs(cost, offsets)
    return tuple(
        Group(
            name=next(iter(producers[g])),
            start=int(offsets[g]),
            size=int(offsets[g + 1] - offsets[g]),
            kind="stream" if g in streams else "plain",
            producers=tuple(producers[g]),
            consumers=tuple(consumers[g]),
            layers=tuple(touched[g]),
            share=share[g],
            exact=not bool(inexact_units[int(offsets[g]) : int(offsets[g + 1])].any()),
        )
        for g in range(num_groups)
    )


def shares_of_macs(cost: CostModel, offsets: IntArray) -> list[float]:
    """Return for each group the fraction of the network's MACs that goes if the whole group goes."""
    sizes = torch.from_numpy(np.diff(offsets)).to(torch.float64)
    without = cost.of_widths(sizes * (1 - torch.eye(len(sizes), dtype=torch.float64))).macs
    total = cost.of_widths(sizes).macs
    shares: list[float] = (1 - without / total.clamp(min=1)).tolist()
    return shares
