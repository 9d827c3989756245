"""Weights that the network computes from a parameter: weight standardisation, weight norm.

An element of a weight belongs to two channels, so the labels along its two dimensions flow apart: each operator runs on
the first ones, then on the second ones, with the same rules as for any other value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import module_of, operator_name
from fastprune.graph.labels.labels import kept_labels, varying_dims
from fastprune.graph.labels.moves import RESHAPING
from fastprune.graph.labels.propagate import Computed, Weight
from fastprune.graph.labels.rules import ELEMENTWISE, RULES, SIZES, Context, apply_rule, give_up, unlabelled_result

EMPTY = (kept_labels(()), kept_labels(()))

# Operators whose rules hold for weights as well as for values.
STATISTICS = {
    *("batch_norm", "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean"),
    *("linalg_vector_norm", "norm", "_weight_norm"),
}


def computed_weights(graph: GraphModule, weights: Mapping[str, Weight]) -> dict[Node, Weight]:
    """Return the operators that compute layers' weights from a parameter: {node: the parameter}."""
    found: dict[Node, Weight] = {}
    for layer in graph.graph.nodes:
        if not is_layer(layer) or not isinstance(layer.args[1], Node) or layer.args[1].op != "call_function":
            continue
        operators = operators_of(layer.args[1])
        if operators is None or not all(stays_inside(node, operators) for node in operators):
            continue
        names = {str(n.target) for node in operators for n in node.all_input_nodes if n.op == "get_attr"}
        sources = {weights[n] for n in names if n in weights and weights[n].shape == shape_of(layer.args[1])}
        if len(sources) == 1 and Computed(source := sources.pop(), EMPTY).layer == module_of(layer):
            found |= dict.fromkeys(operators, source)
    return found


def is_layer(node: Node) -> bool:
    """Return whether a node is a convolution or a linear layer."""
    return node.op == "call_function" and (operator_name(node) == "linear" or operator_name(node).startswith("conv"))


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Return the shape of a value that does not depend on the input."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def operators_of(value: Node) -> set[Node] | None:
    """Return the operators that compute a value, None if it depends on the input."""
    found, pending = set(), [value]
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            pending += node.all_input_nodes
        elif node.op not in ("call_function", "get_attr"):
            return None
    return found


def stays_inside(node: Node, operators: set[Node]) -> bool:
    """Return whether only other operators of the computation read a value, and layers as their weight."""
    return all(user in operators or (is_layer(user) and user.args[1] is node) for user in node.users)


def apply_by_parts(context: Context, args: Any, kwargs: Any, source: Weight) -> Any:
    """Return the labels of an operator's result, on the way from the parameter ``source`` to a weight."""
    state = context.state
    lift = lambda x: state.label_source(x, context.reason) if x == source else x  # noqa: E731
    args, kwargs = pytree.tree_map_only(Weight, lift, (args, kwargs))
    lifted = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Computed)]
    if not lifted or context.operator in SIZES:
        return apply_rule(context, args, kwargs)
    elementwise = context.operator in ELEMENTWISE or torch.Tag.pointwise in getattr(context.node.target, "tags", ())
    known = context.operator in RULES and (context.operator in RESHAPING or context.operator in STATISTICS)
    if not elementwise and not known and context.operator != "getitem":
        return give_up(context, (args, lifted), kwargs)
    results, added = [], len(state.added)
    for part in (0, 1):
        if not any(varying_dims(x.parts[part]) for x in lifted):
            results.append(unlabelled_result(context))
            continue

        def labels(x: Any, part: int = part) -> Any:
            if isinstance(x, Computed):
                return x.parts[part]
            return operand_labels(context, x, lifted, part) if elementwise and isinstance(x, (Weight, Tensor)) else x

        results.append(apply_rule(context, *pytree.tree_map(labels, (args, kwargs))))
    del state.added[added:]  # sums of weights are no residual streams
    return pytree.tree_map(lambda a, b: Computed(source, (a, b)), *results)


def operand_labels(context: Context, x: Weight | Tensor, lifted: list[Computed], part: int) -> Tensor:
    """Return the labels of an elementwise operator's other operand for this part: none unless they vary along it."""
    labels = context.state.labels_of(x, context.reason) if isinstance(x, Weight) else x
    lies = {dim - len(value.shape) for value in lifted for dim in varying_dims(value.parts[part])}
    own = {dim - labels.dim() for dim in varying_dims(labels)}
    return labels if own & lies else kept_labels(tuple(labels.shape))
