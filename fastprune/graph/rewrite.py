"""Rewrite the exported graph of a full network for the channels that stay.

The model's own code may hold widths as numbers (``split(x, [64, 64])``), or cut at channels that are gone. Its graph
can be changed: sizes in it become those of the compact tensors, and moves select the rest of the channels that they
selected.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import argument_of, operator_name, set_argument
from fastprune.graph.labels.labels import core
from fastprune.graph.labels.moves import PARTING
from fastprune.graph.labels.propagate import Computed
from fastprune.graph.labels.rules import describe_node
from fastprune.graph.labels.selection import Selection
from fastprune.graph.model_state import attribute_of
from fastprune.graph.norms import Use, normalise, uses_of
from fastprune.graph.structure import Norm

Kept = npt.NDArray[np.int64] | None  # the indices that stay along a dimension, None for all

# Operators with sizes among their arguments, and the name of that argument.
SIZED = {
    **dict.fromkeys(("view", "_unsafe_view", "expand"), "size"),
    "reshape": "shape",
    "unflatten": "sizes",
}


class RewriteError(ValueError):
    """The graph cannot be rewritten for a plan; names the operator and the module."""


@dataclass(frozen=True)
class RewrittenGraph:
    """A graph without state: its inputs are those of the network, then tensors of the model, then indices.

    Args:
        module: the graph.
        tensors: names of the parameters, buffers and constants that it takes.
        indices: the indices by which it selects channels, int64 each.
        results: the structure of its results.
    """

    module: GraphModule
    tensors: tuple[str, ...]
    indices: tuple[Tensor, ...]
    results: pytree.TreeSpec


def rewrite(
    source: GraphModule,
    labels: Mapping[Node, Any],
    selections: Mapping[Node, list[Selection]],
    keep: npt.NDArray[np.bool_],
    norms: Iterable[Norm] = (),
) -> RewrittenGraph:
    """Rewrite an exported graph for compact tensors.

    Args:
        source: the graph of the full network.
        labels: the labels of its values.
        selections: its moves that take channels.
        keep: for each label, whether its channels stay.
        norms: norms whose statistics count removed channels as zeros.

    Raises:
        RewriteError: if an operator cannot take the new sizes.
    """
    named = {norm.module: norm for norm in norms}
    uses = [(named[name], use) for name, found in uses_of(source, named).items() for use in found]
    calls = {node: (norm, use) for norm, use in uses for node in use.nodes}
    return _Rewriter(source, labels, selections, keep, calls).rewrite()


@dataclass
class _Rewriter:
    """Builds the new graph node by node; ``replacements`` holds the new node, or the new parts, of each old one."""

    source: GraphModule
    labels: Mapping[Node, Any]
    selections: Mapping[Node, list[Selection]]
    keep: npt.NDArray[np.bool_]
    norms: Mapping[Node, tuple[Norm, Use]] = field(default_factory=dict)  # of the nodes in their code
    graph: Graph = field(default_factory=Graph)
    boxes: dict[Node, list[list[Kept]] | None] = field(default_factory=dict)
    replacements: dict[Node, Any] = field(default_factory=dict)
    indices: list[Tensor] = field(default_factory=list)
    index_nodes: list[Node] = field(default_factory=list)
    last_input: Node | None = None

    def rewrite(self) -> RewrittenGraph:
        nodes = list(self.source.graph.nodes)
        for node in nodes:
            if node.op == "placeholder":
                self.last_input = self.replacements[node] = self.graph.placeholder(node.name)
        nodes = [
            node for node in nodes if node.op != "get_attr" or node.users
        ]  # the exporter lists unused tensors, too
        held = {node: str(node.target) for node in nodes if node.op == "get_attr" and self.is_tensor(str(node.target))}
        inputs: dict[str, Node] = {}
        for name in dict.fromkeys(held.values()):
            self.last_input = inputs[name] = self.graph.placeholder(f"tensor_{len(inputs)}")
        self.replacements |= {node: inputs[name] for node, name in held.items()}
        for node in nodes:
            if node not in self.replacements and node.op != "call_module":  # the exporter's guard on input shapes
                self.replacements[node] = self.replace(node)
        self.graph.lint()
        module = GraphModule(self.source, self.graph)
        codegen: Any = self.source.graph._codegen
        return RewrittenGraph(module, tuple(inputs), tuple(self.indices), codegen.pytree_info.out_spec)

    def replace(self, node: Node) -> Any:
        """Return a node's replacement in the new graph; None for a value that need not exist."""
        if node.op == "output" or node.op == "get_attr":
            return self.copy(node)
        if node in self.norms and (source := self.norms[node][1].source) is not None and self.changes(source):
            return self.normalise(node, source) if node in self.norms[node][1].results else None
        result = self.kept(node)
        if result is None:
            return None
        if node in self.selections and self.changes(node):
            parts = [
                self.select(choice, node, labels)
                for choice, labels in zip(self.selections[node], self.parts(node), strict=True)
            ]
            return parts if isinstance(self.labels[node], (list, tuple)) else parts[0]
        if node.target is operator.getitem and isinstance(parts := self.replacements[first_of(node)], list):
            return parts[cast("int", node.args[1])]
        name = operator_name(node)
        if name in PARTING:
            dim = int(argument_of(node, "dim")) % self.parts(node)[0].dim()
            if any(box[dim] is not None for box in result):
                return self.split(node, dim)
        copied = self.copy(node)
        if self.changes(node):
            self.adapt_arguments(node, copied, name, result)
            if node.target is torch.ops.aten.view.default:  # fewer heads have other strides
                copied.target = torch.ops.aten.reshape.default
        return copied

    def normalise(self, node: Node, source: Node) -> Node:
        """Replace the code of a norm by one that counts the removed channels as zeros."""
        norm, use = self.norms[node]
        held = {str(n.target): n for inner in use.nodes for n in inner.all_input_nodes if n.op == "get_attr"}
        tensors = [held.get(f"{norm.module}.{name}") for name in ("weight", "bias")]
        if len(held) != sum(tensor is not None for tensor in tensors) or self.replacements.get(source) is None:
            raise RewriteError(f"the code of the norm {norm.module} shares its parameters or reads several values")
        values = [self.replacements[source], *(None if t is None else self.replacements[t] for t in tensors)]
        arguments = (*values, norm.kind, norm.dim, norm.count, norm.eps)
        return self.graph.call_function(normalise, arguments)

    def adapt_arguments(self, node: Node, copied: Node, name: str, boxes: list[list[Kept]]) -> None:
        """Change the arguments of a copied operator that depend on numbers of channels; its results keep ``boxes``."""
        if name in SIZED:
            self.resize(node, copied, boxes[0], SIZED[name])
        elif "conv" in name:
            self.regroup(node, copied, "groups", depthwise=True)
        elif name == "group_norm":
            self.regroup(node, copied, "num_groups", depthwise=False)
        elif name in ("layer_norm", "rms_norm"):
            sizes = argument_of(node, "normalized_shape")
            kept = zip(sizes, boxes[0][-len(sizes) :], strict=True)
            set_argument(copied, "normalized_shape", [n if k is None else len(k) for n, k in kept])
        elif name == "select":
            self.reselect(node, copied)

    def is_tensor(self, name: str) -> bool:
        """Return whether an attribute is a tensor, not a graph within the graph."""
        return isinstance(attribute_of(self.source, name), Tensor)

    def copy(self, node: Node) -> Node:
        """Copy a node to the new graph."""
        for source in node.all_input_nodes:
            if self.replacements.get(source) is None:
                raise RewriteError(f"{describe_node(node)} reads channels that do not lie along one dimension")
        return self.graph.node_copy(node, self.replacements.__getitem__)

    # --- the indices that stay ----------------------------------------------------------------------------------

    def parts(self, node: Node) -> list[Tensor]:
        """Return the labels of each result of a node."""
        return [x for x in pytree.tree_leaves(self.labels.get(node)) if isinstance(x, Tensor)]

    def kept(self, node: Node) -> list[list[Kept]] | None:
        """Return the indices that stay along each dimension of each result; None if they form no box."""
        if node not in self.boxes:
            values = pytree.tree_leaves(self.labels.get(node))
            found = [self.box(x) for x in values if isinstance(x, (Tensor, Computed))]
            self.boxes[node] = None if any(box is None for box in found) else cast("list[list[Kept]]", found)
        return self.boxes[node]

    def box(self, value: Tensor | Computed) -> list[Kept] | None:
        """Return the indices that stay along each dimension of a value or a weight; None if they form no box."""
        if isinstance(value, Tensor):
            return kept_box(value, self.keep)
        rows, columns = (kept_box(part, self.keep) for part in value.parts)
        return None if rows is None or columns is None else [*map(intersect, rows, columns)]

    def changes(self, node: Node) -> bool:
        """Return whether a node or anything that it reads has fewer channels."""
        for touched in (node, *node.all_input_nodes):
            boxes = self.kept(touched)
            if boxes is None or any(kept is not None for box in boxes for kept in box):
                return True
        return False

    # --- moves --------------------------------------------------------------------------------------------------

    def select(self, choice: Selection, node: Node, labels: Tensor) -> Node:
        """Select the rest of a selection's channels from its base."""
        base_boxes, box = self.kept(choice.base), kept_box(labels, self.keep)
        source: Node | None = self.replacements[choice.base]
        if base_boxes is None or box is None or source is None:
            raise RewriteError(f"{describe_node(node)} takes channels of a value that does not exist on its own")
        kept, held = box[choice.dim], base_boxes[0][choice.dim]
        if kept is None:
            kept = np.arange(labels.size(choice.dim))
        if held is None:
            held = np.arange(self.parts(choice.base)[0].size(choice.dim))
        places = np.searchsorted(held, choice.indices.numpy()[kept])
        if np.array_equal(places, np.arange(len(held))):
            return source
        first = int(places[0]) if len(places) else 0
        if np.array_equal(places, np.arange(first, first + len(places))):  # a view: in-place operators may need one
            ends = (source, choice.dim, first, first + len(places))
            return self.graph.call_function(torch.ops.aten.slice.Tensor, ends)
        places_node = self.index(torch.from_numpy(places))
        return self.graph.call_function(torch.ops.aten.index_select.default, (source, choice.dim, places_node))

    def index(self, indices: Tensor) -> Node:
        """Return an input for a tensor of indices, a new one if no other holds the same indices."""
        for known, node in zip(self.indices, self.index_nodes, strict=True):
            if torch.equal(known, indices):
                return node
        with self.graph.inserting_after(self.last_input):
            node = self.graph.placeholder(f"indices_{len(self.indices)}")
        self.last_input = node
        self.indices.append(indices)
        self.index_nodes.append(node)
        return node

    def split(self, node: Node, dim: int) -> Node:
        """Split a value into parts of the sizes that are left."""
        boxes = [kept_box(labels, self.keep) for labels in self.parts(node)]
        kept = [None if box is None else box[dim] for box in boxes]
        sizes = [part.size(dim) if k is None else len(k) for part, k in zip(self.parts(node), kept, strict=True)]
        source = self.replacements[first_of(node)]
        if source is None:
            raise RewriteError(f"{describe_node(node)} cuts a value that does not exist on its own")
        return self.graph.call_function(torch.ops.aten.split_with_sizes.default, (source, sizes, dim))

    # --- arguments ----------------------------------------------------------------------------------------------

    def resize(self, node: Node, copied: Node, box: list[Kept], argument: str) -> None:
        """Replace the full sizes by the compact ones."""
        sizes = list(argument_of(copied, argument))
        dims = len(box) - len(sizes)  # number of dimensions that "unflatten" does not change
        first = int(argument_of(node, "dim")) % (dims + 1) if operator_name(node) == "unflatten" else 0
        for place, size in enumerate(sizes):
            kept = box[first + place]
            if kept is None or (isinstance(size, int) and size == -1):
                continue
            if isinstance(size, int):
                sizes[place] = len(kept)
                continue
            parts = self.parts(node)
            if not parts:
                raise RewriteError(f"{describe_node(node)} computes the number of channels from the size of the input")
            sizes[place] = self.scale(size, len(kept), parts[0].size(first + place), copied)
        set_argument(copied, argument, sizes)

    def scale(self, size: Node, kept: int, full: int, reader: Node) -> Node:
        """Return the part ``kept / full`` of a size that the graph computes: the images and heads of a batch, say."""
        part = Fraction(kept, full)
        with self.graph.inserting_before(reader):
            times = self.graph.call_function(operator.mul, (size, part.numerator))
            return self.graph.call_function(operator.floordiv, (times, part.denominator))

    def regroup(self, node: Node, copied: Node, argument: str, *, depthwise: bool) -> None:
        """Set the number of groups that are left; whole groups leave a depthwise convolution or a group norm."""
        groups = argument_of(node, argument)
        labels, boxes = self.parts(first_of(node))[0], self.kept(first_of(node))
        kept = boxes[0][1] if boxes is not None else None
        if groups is None or kept is None or (depthwise and groups != labels.size(1)):
            return
        set_argument(copied, argument, max(1, groups * len(kept) // labels.size(1)))

    def reselect(self, node: Node, copied: Node) -> None:
        """Set the index of a single channel to its place among those that stay."""
        boxes, dim, index = self.kept(first_of(node)), int(argument_of(node, "dim")), int(argument_of(node, "index"))
        labels = self.parts(first_of(node))[0]
        kept = boxes[0][dim % labels.dim()] if boxes is not None else None
        if kept is not None:
            set_argument(copied, "index", int(np.searchsorted(kept, index % labels.size(dim))))


def kept_box(labels: Tensor, keep: npt.NDArray[np.bool_]) -> list[Kept] | None:
    """Return the indices of ``labels`` that stay along each dimension, None if they form no box."""
    small = core(labels)
    stays = keep[small.numpy()]
    if stays.all():
        return [None] * labels.dim()
    box: list[Kept] = []
    product = np.ones((1,) * stays.ndim, dtype=bool)
    for axis in range(stays.ndim):
        vector = stays.any(axis=tuple(a for a in range(stays.ndim) if a != axis))
        box.append(None if vector.all() else np.flatnonzero(vector))
        product = product & vector.reshape([-1 if a == axis else 1 for a in range(stays.ndim)])
    return box if np.array_equal(product & np.ones_like(stays), stays) else None


def intersect(a: Kept, b: Kept) -> Kept:
    """Return the indices that stay in both of two sets."""
    return b if a is None else a if b is None else np.intersect1d(a, b)


def first_of(node: Node) -> Node:
    """Return the first argument of a node, a node."""
    return cast("Node", node.args[0])
