"""The axes of each operator: the widths that its time depends on, and the dimensions that shrink with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import argument_of
from fastprune.graph.labels.interpret import run_on_labels
from fastprune.graph.labels.labels import KEPT, core, varying_dims
from fastprune.graph.labels.propagate import Computed, Propagation, Weight
from fastprune.graph.latency.axes import Axis, block_of
from fastprune.graph.latency.operations import GroupCount, Operand, scale_operand
from fastprune.graph.structure import GraphStructure, Layer, index_slices


class AxisFinder:
    """Finds the axes of a network's operators from the labels of its values."""

    def __init__(self, graph: GraphStructure, device: torch.device) -> None:
        self.device = device
        self.group_of_unit = graph.group_of_unit.numpy()
        self.sizes = graph.offsets.diff().tolist()
        self.slices = index_slices(graph.slices)
        # Labels also pass operators that mix channels: the graph says which of them are prunable.
        state = Propagation(
            exact=False, rewrites=graph.rewrites, norms={norm.module for norm in graph.norms}, heads=graph.heads
        )
        self.labels = run_on_labels(graph.traced.evaluation, graph.traced.inputs, state, record=True)
        self.unit_of_label = np.full(state.space.count, -1)
        for place, labelled in state.dims.items():
            if place in self.slices:
                self.unit_of_label[labelled.labels.numpy()] = self.slices[place].units.numpy()
        self.unit_of_label[KEPT] = -1

    def axis_of(self, units: Any, step: int = 1) -> Axis:
        """Return the width of a vector of channels, given the unit of each."""
        prunable = units[units >= 0]
        groups, channels = np.unique(self.group_of_unit[prunable], return_counts=True)
        counts = tuple((int(g), int(n) // self.sizes[g]) for g, n in zip(groups, channels, strict=True))
        return Axis(len(units), int((units < 0).sum()), counts, step, block_of(self.device))

    # --- layers -------------------------------------------------------------------------------------------------

    def scale_layer(
        self, node: Node, layer: Layer, arguments: tuple[Any, Any]
    ) -> tuple[tuple[Axis, ...], tuple[Any, Any]]:
        """Return the widths in and out of a layer (one if it is depthwise), and its arguments scaled with them."""
        groups = int(argument_of(node, "groups") or 1) if layer.depthwise or layer.kind.startswith("conv") else 1
        step = 1 if layer.depthwise else groups
        axes = [self.axis_of(layer.in_units.numpy(), step)]
        if not layer.depthwise:
            axes.append(self.axis_of(layer.out_units.numpy(), step))
        leaves, spec = pytree.tree_flatten(arguments)
        for place, (leaf, source) in enumerate(zip(leaves, sources_of(node, len(leaves)), strict=True)):
            if isinstance(leaf, Operand):
                dims = [(layer.channel_dim, 0)] if place == 0 else self.layer_dims(layer, source)
                leaves[place] = scale_operand(leaf, dims, axes)
        (args, kwargs) = pytree.tree_unflatten(leaves, spec)
        if layer.depthwise:
            names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
            place = names.index("groups")
            if place < len(args):
                args = (*args[:place], GroupCount(groups), *args[place + 1 :])
            else:
                kwargs["groups"] = GroupCount(groups)
        return tuple(axes), (args, kwargs)

    def layer_dims(self, layer: Layer, source: Any) -> list[tuple[int, int]]:
        """Return the dimensions with channels of an operand that is not the layer's input, and the axis of each."""
        labels = self.labels.get(source)
        makes = 0 if layer.depthwise else 1
        found = []
        if isinstance(labels, (Weight, Computed)):
            for dim in range(len(labels.shape)):
                piece = self.slices.get((labels.name, dim))
                if piece is not None:
                    reads = piece.role == "in" or (piece.role == "channel" and are_read(layer, piece.units))
                    found.append((dim, 0 if reads else makes))
        elif isinstance(labels, Tensor):
            for dim in self.prunable_dims(labels):
                units = torch.from_numpy(self.unit_of_label[core(labels).flatten().numpy()])
                found.append((dim, 0 if are_read(layer, units) else makes))
        return found

    # --- other operators ----------------------------------------------------------------------------------------

    def scale_operator(self, node: Node, arguments: tuple[Any, Any]) -> tuple[tuple[Axis, ...], tuple[Any, Any]]:
        """Return the width of the widest tensor that an operator reads or makes; other tensors shrink in proportion."""
        leaves, spec = pytree.tree_flatten(arguments)
        sources = pytree.tree_leaves((tuple(node.args), dict(node.kwargs)))
        labels = [self.labels.get(s) if isinstance(s, Node) else None for s in sources]
        found = [x for x in (*labels, *pytree.tree_leaves(self.labels.get(node))) if isinstance(x, Tensor)]
        vectors = [self.unit_of_label[core(x).flatten().numpy()] for x in found]
        widest = max((v for v in vectors if (v >= 0).any()), key=len, default=None)
        if widest is None:
            return (), arguments
        axes = (self.axis_of(widest),)
        if len(labels) == len(leaves):
            dims = [self.prunable_dims(x) for x in labels]
            leaves = [
                scale_operand(leaf, tuple((d, 0) for d in where), axes) if isinstance(leaf, Operand) else leaf
                for leaf, where in zip(leaves, dims, strict=True)
            ]
        return axes, pytree.tree_unflatten(leaves, spec)

    def prunable_dims(self, labels: Any) -> list[int]:
        """Return the dimension of a value that holds prunable channels; none if they lie along several."""
        if isinstance(labels, Weight):
            names = [(labels.name, dim) for dim in range(len(labels.shape))]
            return [dim for name, dim in names if (name, dim) in self.slices]
        if not isinstance(labels, Tensor) or not (self.unit_of_label[core(labels).numpy()] >= 0).any():
            return []
        ways = varying_dims(labels)
        return ways if len(ways) == 1 else []


def are_read(layer: Layer, units: Tensor) -> bool:
    """Return whether channels are those that a layer reads, not those that it makes."""
    return torch.equal(units, layer.in_units) and not torch.equal(units, layer.out_units)


def sources_of(node: Node, leaves: int) -> list[Node | None]:
    """Return the node of each argument; None for all if one node stands for several."""
    found = pytree.tree_leaves((tuple(node.args), dict(node.kwargs)))
    return [x if isinstance(x, Node) else None for x in found] if len(found) == leaves else [None] * leaves
