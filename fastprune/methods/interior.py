"""Which channels the papers with gates inside blocks (DMC, DDNP, SANP) prune."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from fastprune.budget import Budget
from fastprune.graph import ChannelGraph, Group, Layer

# Operators after which DMC and its successors put a gate ("always placed after ReLU activation functions").
ACTIVATIONS = {
    *("relu", "relu6", "prelu", "leaky_relu", "rrelu", "hardtanh", "hardswish", "silu", "gelu", "mish", "elu", "celu"),
    *("selu", "softplus", "tanh", "sigmoid", "hardsigmoid", "threshold", "clamp", "clamp_min"),
}


def interior_units(graph: ChannelGraph) -> Tensor:
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
    flow = _Flow(graph)
    inside = torch.zeros(graph.num_units, dtype=torch.bool)
    for group in graph.groups:
        inside[group.units] = group.kind == "interior" and flow.is_gated(group)
    return inside


def gated_units(graph: ChannelGraph, groups: str) -> Tensor:
    """The units of an option ``groups``: "all", or "interior" for ``interior_units``; bool [U]."""
    return interior_units(graph) if groups == "interior" else torch.ones(graph.num_units, dtype=torch.bool)


def prunable_cost(graph: ChannelGraph, budget: Budget, units: Tensor) -> float:
    """The cost of the layers that some of ``units`` can make smaller, T_total of the papers.

    Args:
        graph: the network.
        budget: says which cost is meant.
        units: bool [U].

    Returns:
        MACs of all layers (or parameters of all tensors) that shrink with any of the units, in the full network. For
        ``interior_units`` these are the layers next to a gate: 3609 of ResNet-50's 4089 million MACs.
    """
    model = graph.cost_model
    shrinking = {s.tensor for s in graph.slices if bool(units[s.units[s.units >= 0]].any())}
    uses = {name: model.positions.get(name, 0) if budget.resource == "flops" else 1 for name in model.shapes}
    return float(sum(prod(model.shapes[name]) * uses[name] for name in shrinking & uses.keys()))


class _Flow:
    """Questions about the order of layers, answered on the traced operators."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.layers = {layer.node: layer for layer in graph.layers}
        nodes = [node for node in graph.traced.evaluation.graph.nodes if node.op == "call_function"]
        self.nodes = {node.name: node for node in nodes}
        self.stem = self._layers_at_the_start(nodes)
        self.head = self._layers_at_the_end(nodes)

    def is_gated(self, group: Group) -> bool:
        makers = [layer for layer in self.graph.layers if not layer.depthwise and touches(layer.out_units, group)]
        readers = [layer for layer in self.graph.layers if not layer.depthwise and touches(layer.in_units, group)]
        return (
            not any(layer.node in self.stem for layer in makers)
            and not any(layer.node in self.head for layer in readers)
            and any(self._reads_an_activation(layer) for layer in readers)
            and not (readers and all(self._only_scales(layer) for layer in readers))
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
            vector = layer is not None and layer.kind == "linear" and self.graph.cost_model.positions[layer.weight] == 1
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

    def _only_scales(self, layer: Layer) -> bool:
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


def touches(units: Tensor, group: Group) -> bool:
    """Whether any of ``units`` belongs to ``group``."""
    return bool(((units >= group.start) & (units < group.start + group.size)).any())


def operator_name(node: Node) -> str:
    """``relu`` for ``aten.relu_.default``."""
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", "").rstrip("_")
