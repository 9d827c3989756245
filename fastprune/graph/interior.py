"""Which channels the papers with gates inside blocks (DMC, DDNP, SANP) prune."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from fastprune.graph.export.nodes import concrete, operator_name
from fastprune.graph.structure import GraphStructure, Group, Layer

# Operators after which DMC and its successors put a gate ("always placed after ReLU activation functions").
ACTIVATIONS = {
    *("relu", "relu6", "prelu", "leaky_relu", "rrelu", "hardtanh", "hardswish", "silu", "gelu", "mish", "elu", "celu"),
    *("selu", "softplus", "tanh", "sigmoid", "hardsigmoid", "threshold", "clamp", "clamp_min"),
}


def interior_units(graph: GraphStructure) -> Tensor:
    """The units inside blocks: those that DMC, DDNP and SANP put gates on.

    A group counts if its channels pass an activation on their way to a layer that reads them, and are none of these:

    * channels of a residual stream,
    * channels that a layer makes directly from the network's input (the stem),
    * channels that the classifier reads (the last layers, as far back as they are linear layers on single vectors),
    * the squeezed channels of an attention branch, which only scale other channels.

    This gives two groups per ResNet bottleneck, one per ResNet basic block, and one per inverted residual block with an
    expansion. In a plain network (VGG) all convolutions but the first and the last count; hidden layers of a classifier
    do not. Where there are no residual streams, ``groups="all"`` is often the better choice.

    Args:
        graph: the network.

    Returns:
        bool [U].

    Source: Gao et al., CVPR 2020, §4.1 and Fig. 3.
    """
    flow = Flow(graph)
    inside = torch.zeros(graph.num_units, dtype=torch.bool)
    for group in graph.groups:
        inside[group.units] = group.kind == "interior" and flow.is_gated(group)
    return inside


def last_gated_units(graph: GraphStructure, gated: Tensor) -> Tensor:
    """Of the units inside blocks those that no other gate follows within the block: one gate per residual block.

    In a ResNet bottleneck these are the channels between the second and the third convolution.

    Args:
        graph: the network.
        gated: ``interior_units`` of it, bool [U].

    Returns:
        bool [U].

    Raises:
        ValueError: where that takes no gate away, or there are no residual blocks; says which.
    """
    if not any(group.kind == "stream" for group in graph.groups):
        raise ValueError("groups 'one_gate': this network has no residual blocks; give groups 'interior' or 'all'")
    last = gated.clone()
    for group in graph.groups:
        readers = [layer for layer in graph.layers if not layer.depthwise and touches(layer.in_units, group)]
        made = [layer.out_units[layer.out_units >= 0] for layer in readers]
        last[group.units] &= not any(bool(gated[units].any()) for units in made)
    if torch.equal(last, gated):
        raise ValueError(
            "groups 'one_gate': no residual block of this network has two gates (those of an inverted residual are "
            "one, used twice); give groups 'interior'"
        )
    return last


class Flow:
    """Questions about the order of layers, answered on the traced operators."""

    def __init__(self, graph: GraphStructure) -> None:
        self.graph = graph
        self.layers = {layer.node: layer for layer in graph.layers}
        nodes = [node for node in graph.traced.evaluation.graph.nodes if node.op == "call_function"]
        self.nodes = {node.name: node for node in nodes}
        self.stem = self._layers_at_the_start(nodes)
        self.head = self._layers_at_the_end(nodes)

    def is_gated(self, group: Group) -> bool:
        """Whether a group's channels get a gate, see ``interior_units``; residual streams are not asked about."""
        makers = [layer for layer in self.graph.layers if not layer.depthwise and touches(layer.out_units, group)]
        readers = [layer for layer in self.graph.layers if not layer.depthwise and touches(layer.in_units, group)]
        return (
            not any(layer.node in self.stem for layer in makers)
            and not any(layer.node in self.head for layer in readers)
            and any(self._reads_an_activation(layer) for layer in readers)
            and not (readers and all(self.only_scales(layer) for layer in readers))
        )

    def _layers_at_the_start(self, nodes: list[Node]) -> set[str]:
        """Layers with no other layer before them."""
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
        """Layers with no layer behind them, and linear layers on single vectors with nothing but such behind them."""
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
        """Whether an activation lies between this layer and the layers before it."""
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
        """Whether what the layer makes is only ever multiplied to something that it did not make (SE and its kin)."""
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
        """The layers that read what a layer makes with no other layer between, by their nodes."""
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
        """The activation that alone reads what a layer makes, after its normalisation if it has one."""
        node = self.nodes[layer.node]
        while len(node.users) == 1:
            (node,) = node.users
            if operator_name(node) in ACTIVATIONS:
                return operator_name(node)
            if operator_name(node) != "batch_norm":
                return None
        return None

    def pixels_scaled(self, layer: Layer) -> int:
        """The pixels of what an attention branch's last layer scales, see ``only_scales``."""
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


def touches(units: Tensor, group: Group) -> bool:
    """Whether any of ``units`` belongs to ``group``."""
    return bool(((units >= group.start) & (units < group.start + group.size)).any())


def gated_units(graph: GraphStructure, groups: str) -> Tensor:
    """The units of an option ``groups``, bool [U].

    "all", "interior" for ``interior_units``, or "one_gate" for the last of them in every residual block.
    """
    if groups == "one_gate":
        return last_gated_units(graph, interior_units(graph))
    return interior_units(graph) if groups == "interior" else torch.ones(graph.num_units, dtype=torch.bool)
