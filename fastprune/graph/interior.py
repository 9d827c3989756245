"""The channels that papers with gates inside blocks (DMC, DDNP, SANP) prune."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from fastprune.graph.export.nodes import concrete, operator_name
from fastprune.graph.structure import GraphStructure, Group, Layer, belong_to

# Operators after which DMC and its successors put a gate ("always placed after ReLU activation functions").
ACTIVATIONS = {
    *("relu", "relu6", "prelu", "leaky_relu", "rrelu", "hardtanh", "hardswish", "silu", "gelu", "mish", "elu", "celu"),
    *("selu", "softplus", "tanh", "sigmoid", "hardsigmoid", "threshold", "clamp", "clamp_min"),
}

GROUPS = (
    "prunable channels: all; interior: only those inside blocks (no residual stream, stem or classifier input); auto: "
    "interior in networks with residual blocks, all in others"
)
"""What the option ``groups`` of methods means."""


def interior_units(graph: GraphStructure) -> Tensor:
    """Return the units inside blocks, on which DMC, DDNP and SANP put gates.

    A group counts if its channels pass an activation on their way to a layer that reads them, and are none of these:

    * channels of a residual stream,
    * channels that a layer makes directly from the network's input (the stem),
    * channels that the classifier reads (the last layer, and linear layers on single vectors in front of it),
    * the squeezed channels of an attention branch, which only scale other channels.

    This gives two groups per ResNet bottleneck, one per ResNet basic block, and one per inverted residual block with an
    expansion. In a plain network (VGG) all convolutions but the first and the last count; hidden layers of a classifier
    do not. Where there are no residual streams, the option ``groups="auto"`` of methods takes all groups instead.

    Args:
        graph: the network.

    Returns:
        bool [U].

    Source: Gao et al., CVPR 2020, §4.1 and Fig. 3.
    """
    flow = Flow(graph)
    inside = torch.zeros(graph.num_units, dtype=torch.bool)
    for group in graph.groups:
        inside[group.units] = group.kind == "plain" and flow.is_gated(group)
    return inside


def last_gated_units(graph: GraphStructure, gated: Tensor) -> Tensor:
    """Return the units inside blocks that no other gate follows within the block: one gate per residual block.

    In a ResNet bottleneck these are the channels between the second and the third convolution.

    Args:
        graph: the network.
        gated: the network's ``interior_units``, bool [U].

    Returns:
        bool [U].

    Raises:
        ValueError: if this removes no gate, or there are no residual blocks; says which.
    """
    if not any(group.kind == "stream" for group in graph.groups):
        raise ValueError("groups 'one_gate': this network has no residual blocks; give groups 'interior' or 'all'")
    last = gated.clone()
    for group in graph.groups:
        readers = [layer for layer in graph.layers if not layer.depthwise and layer.reads(group)]
        last[group.units] &= not any(bool(belong_to(layer.out_units, gated).any()) for layer in readers)
    if torch.equal(last, gated):
        raise ValueError(
            "groups 'one_gate': no residual block of this network has two gates (an inverted residual has one, used "
            "twice); give groups 'interior'"
        )
    return last


class Flow:
    """The order of a network's layers, read from the traced operators."""

    def __init__(self, graph: GraphStructure) -> None:
        self.graph = graph
        self.layers = {layer.node: layer for layer in graph.layers}
        nodes = [node for node in graph.traced.evaluation.graph.nodes if node.op == "call_function"]
        self.nodes = {node.name: node for node in nodes}
        self.stem = self._layers_at_the_start(nodes)
        self.head = self._layers_at_the_end(nodes)

    def is_gated(self, group: Group) -> bool:
        """Return whether a group, which is no residual stream, gets a gate; see ``interior_units``."""
        makers = [layer for layer in self.graph.layers if not layer.depthwise and layer.makes(group)]
        readers = [layer for layer in self.graph.layers if not layer.depthwise and layer.reads(group)]
        return (
            not any(layer.node in self.stem for layer in makers)
            and not any(layer.node in self.head for layer in readers)
            and any(self._reads_an_activation(layer) for layer in readers)
            and not (readers and all(self.only_scales(layer) for layer in readers))
        )

    def _layers_at_the_start(self, nodes: list[Node]) -> set[str]:
        """Return the layers with no other layer before them."""
        after_a_layer: set[Node] = set()
        first = set()
        for node in nodes:
            reached = any(x in after_a_layer for x in node.all_input_nodes)
            if node.name in self.layers and not reached:
                first.add(node.name)
            if reached or node.name in self.layers:
                after_a_layer.add(node)
        return first

    def _layers_at_the_end(self, nodes: list[Node]) -> set[str]:
        """Return the layers with no layer behind them, and linear layers on single vectors in front of such layers."""
        before_a_layer: set[Node] = set()
        before_the_body: set[Node] = set()
        head = set()
        for node in reversed(nodes):
            layer = self.layers.get(node.name)
            ahead = any(user in before_a_layer for user in node.users)
            body_ahead = any(user in before_the_body for user in node.users)
            vector = layer is not None and layer.kind == "linear" and layer.positions == 1
            if layer is not None and (not ahead or (vector and not body_ahead)):
                head.add(node.name)
            elif layer is not None:
                before_the_body.add(node)
            if ahead or layer is not None:
                before_a_layer.add(node)
            if body_ahead:
                before_the_body.add(node)
        return head

    def _reads_an_activation(self, layer: Layer) -> bool:
        """Return whether an activation lies between this layer and the layers before it."""
        pending, seen = [self.nodes[layer.node].all_input_nodes[0]], set[Node]()
        while pending:
            node = pending.pop()
            made_by = self.layers.get(node.name)
            if node in seen or (made_by is not None and not made_by.depthwise):
                continue
            seen.add(node)
            if operator_name(node) in ACTIVATIONS:
                return True
            pending += node.all_input_nodes
        return False

    def only_scales(self, layer: Layer) -> bool:
        """Return whether the layer's outputs only scale tensors that it did not make (squeeze-and-excitation, say)."""
        start = self.nodes[layer.node]
        own, pending, multiplied = {start}, list(start.users), False
        while pending:
            node = pending.pop()
            others = [x for x in node.all_input_nodes if x not in own and x.op != "get_attr"]
            if operator_name(node) == "mul" and others:
                multiplied = True
            elif node.op != "call_function" or node.name in self.layers or others:
                return False
            elif node not in own:
                own.add(node)
                pending += node.users
        return multiplied

    def readers(self, layer: Layer) -> set[str]:
        """Return the nodes of the layers that read a layer's outputs with no other layer between."""
        found, pending, seen = set(), list(self.nodes[layer.node].users), set[Node]()
        while pending:
            node = pending.pop()
            if node.name in self.layers:
                found.add(node.name)
            elif node not in seen:
                seen.add(node)
                pending += node.users
        return found

    def activation_after(self, layer: Layer) -> str | None:
        """Return the activation that alone reads a layer's outputs, after its normalisation if it has one."""
        node = self.nodes[layer.node]
        while len(node.users) == 1:
            (node,) = node.users
            if operator_name(node) in ACTIVATIONS:
                return operator_name(node)
            if operator_name(node) != "batch_norm":
                return None
        return None

    def scaled_pixels(self, layer: Layer) -> int:
        """Return the number of pixels that an attention branch's last layer scales; see ``only_scales``."""
        start = self.nodes[layer.node]
        own, pending = {start}, list(start.users)
        while pending:
            node = pending.pop()
            if operator_name(node) == "mul" and any(x not in own and x.op != "get_attr" for x in node.all_input_nodes):
                return prod(concrete(size) for size in node.meta["val"].shape[2:])
            if node not in own:
                own.add(node)
                pending += node.users
        return 0


def choose_groups(graph: GraphStructure, groups: str) -> str:
    """Return "interior" or "all" for the option "auto", and any other value as it is.

    The papers put gates inside residual blocks. A plain network has no blocks: there "interior" would leave out the
    first layer, and with it everything in a network of two or three layers.
    """
    if groups != "auto":
        return groups
    inside = any(group.kind == "stream" for group in graph.groups) and bool(interior_units(graph).any())
    return "interior" if inside else "all"


def gated_units(graph: GraphStructure, groups: str) -> Tensor:
    """Return the units that an option ``groups`` means, bool [U].

    Args:
        graph: the network.
        groups: "all"; "interior" (``interior_units``); "one_gate" (``last_gated_units``); or "auto": "interior" in
            networks with residual streams, "all" in others, see ``choose_groups``.
    """
    groups = choose_groups(graph, groups)
    if groups == "one_gate":
        return last_gated_units(graph, interior_units(graph))
    return interior_units(graph) if groups == "interior" else torch.ones(graph.num_units, dtype=torch.bool)
