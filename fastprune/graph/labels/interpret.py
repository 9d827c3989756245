"""Execution of an exported graph on labels: a walk over its nodes that applies the rules of its operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fastprune.graph.export.inputs import Inputs
from fastprune.graph.export.nodes import concrete
from fastprune.graph.labels import attention, channelwise, layers, moves  # noqa: F401 - they register their rules
from fastprune.graph.labels.computed import apply_by_parts, computed_weights
from fastprune.graph.labels.labels import kept_labels
from fastprune.graph.labels.propagate import Propagation, Weight
from fastprune.graph.labels.rules import Context, apply_rule
from fastprune.graph.model_state import attribute_of


def run_on_labels(graph: GraphModule, inputs: Inputs, state: Propagation, *, record: bool) -> dict[Node, Any]:
    """Let labels flow through ``graph``.

    Args:
        graph: an exported graph whose parameters and buffers are attributes.
        inputs: the example; only its shapes matter here.
        state: the findings, which are added to.
        record: whether convolutions and linear layers are recorded as calls (the eval-mode graph) or only labelled.

    Returns:
        The labels of every node's value.
    """
    weights = weights_of(graph)
    computed = {} if state.exact else computed_weights(graph, weights)
    values: dict[Node, Any] = {}
    remaining = list(inputs.tensors)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = kept_labels(tuple(remaining.pop(0).shape))
        elif node.op == "get_attr":
            values[node] = attribute_labels(graph, str(node.target), weights)
        elif node.op == "output":
            pin_outputs(node, values, state)
        elif node.op == "call_function":
            args = map_arg(node.args, values.__getitem__)
            kwargs = map_arg(node.kwargs, values.__getitem__)
            context = Context(state, node, inputs.batch, output_shapes(node), record)
            if node in computed:
                values[node] = apply_by_parts(context, args, kwargs, computed[node])
            else:
                values[node] = apply_rule(context, args, kwargs)
        else:  # a call_module is an exporter's guard; it returns nothing
            values[node] = None
    return values


def attribute_labels(graph: GraphModule, name: str, weights: dict[str, Weight]) -> Weight | Tensor | None:
    """Return a parameter or buffer, the labels of a constant in the model's code (all kept), or None for a graph."""
    if name in weights:
        return weights[name]
    value = attribute_of(graph, name)
    return kept_labels(tuple(value.shape)) if isinstance(value, Tensor) else None


def weights_of(graph: GraphModule) -> dict[str, Weight]:
    """Return the parameters and buffers by the names that the graph uses; a tied tensor has its first name."""
    first: dict[int, str] = {}
    weights = {}
    for named in (graph.named_parameters, graph.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            weights[name] = Weight(first.setdefault(id(tensor), name), tuple(tensor.shape))
    return weights


def pin_outputs(node: Node, values: dict[Node, Any], state: Propagation) -> None:
    """Pin the network's results, which keep their shapes."""

    def pin(source: Node) -> Node:
        value = values[source]
        if isinstance(value, Weight):
            state.locked.setdefault(value.name, "output of the network")
        for labels in pytree.tree_leaves(value):
            if isinstance(labels, Tensor):
                state.space.pin(labels, "output of the network")
        return source

    map_arg(node.args, pin)


def output_shapes(node: Node) -> Any:
    """Return the shape of the node's value, a list for several; symbolic sizes become those of the example."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(concrete(size) for size in value.shape)
    if isinstance(value, (list, tuple)):
        return [tuple(concrete(size) for size in v.shape) for v in value if isinstance(v, Tensor)]
    return None
