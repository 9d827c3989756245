"""The effect of each operator on labels: the table of rules, and the rule of elementwise operators.

Convolutions and linear layers (``layers``), normalisations, pooling and reductions (``channelwise``) have a rule each.
Operators that only move data (``moves``) are executed on the labels. Elementwise operators unite the labels that meet.
All other operators pin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import concrete, module_of, operator_name
from fastprune.graph.export.refusals import TraceError
from fastprune.graph.export.regions import MODES
from fastprune.graph.labels.labels import IntArray, canonicalise, core, kept_labels, spread, varying_dims
from fastprune.graph.labels.propagate import Computed, Propagation, Weight


@dataclass(frozen=True)
class Context:
    """One application of a rule.

    Args:
        state: the findings so far.
        node: the node of the graph.
        batch: samples in the example.
        shape: the shape of the node's result, a list of them for several, None for no tensor.
        record: whether the MACs of layers are counted.
    """

    state: Propagation
    node: Node
    batch: int
    shape: Any
    record: bool

    @property
    def operator(self) -> str:
        """The operator's name, see ``operator_name``."""
        return operator_name(self.node)

    @property
    def reason(self) -> str:
        """The operator and the module, for messages."""
        return describe_node(self.node)


SIZES = {"sym_size", "sym_numel"}
ON_WEIGHTS = {*SIZES, "index", "index_select"}  # whose rules take weights as they are


def describe_node(node: Node) -> str:
    """Return the operator and the module of a node, for messages."""
    name = operator_name(node)
    unknown = "::" in name and name not in RULES
    hint = " (has no rule; one can be registered, see docs/custom_operators.md)" if unknown else ""
    return f"{name} in {module_of(node) or 'the model'}{hint}"


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply_rule(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the labels of an operator's result."""
    if isinstance(context.node.target, torch._ops.HigherOrderOperator):
        count_region(context)
        return give_up(context, args, kwargs)  # a graph of its own, torch.cond say
    if context.node.target in MODES:
        return None
    if not isinstance(context.node.target, torch._ops.OpOverload):
        return apply_function(context, args, kwargs)
    if context.operator in RULES:
        if args and isinstance(args[0], Weight) and context.operator not in ON_WEIGHTS and "::" not in context.operator:
            args = (context.state.labels_of(args[0], context.reason), *args[1:])  # a parameter in place of an input
        return RULES[context.operator](context, *args, **kwargs)
    elementwise = torch.Tag.pointwise in context.node.target.tags or context.operator in ELEMENTWISE
    if elementwise and isinstance(context.shape, tuple):
        return unite(context, operands(context, args, kwargs))
    return give_up(context, args, kwargs)


def apply_function(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute arithmetic on sizes and ``getitem``; give up on other functions.

    Raises:
        TraceError: for functions of ``torch.func``; inside them tensors lack dimensions that the example has.
    """
    home = str(getattr(context.node.target, "__module__", ""))
    if home in ("_operator", "math", "builtins", "torch"):
        return context.node.target(*args, **kwargs)  # type: ignore[operator]
    if "functorch" in home:
        where = module_of(context.node) or "the model"
        raise TraceError(f"{where} calls torch.vmap (or a relative of it), which is not supported; write it as a batch")
    return give_up(context, args, kwargs)


def count_region(context: Context) -> None:
    """Count the MACs of layers in a region with a graph of its own; their channels stay, so their cost is fixed.

    Raises:
        TraceError: if the sizes of its tensors are unknown.
    """
    owner = context.node.graph.owning_module
    regions = [getattr(owner, str(n.target), None) for n in context.node.all_input_nodes if n.op == "get_attr"]
    for node in (node for region in regions if isinstance(region, GraphModule) for node in region.graph.nodes):
        name = str(node.target)
        if not name.startswith(("aten.conv", "aten.linear")) or not context.record:
            continue
        found = [getattr(n, "meta", {}).get("val") for n in (node, *node.args[:2])]
        values = [value for value in found if isinstance(value, Tensor)]
        if len(values) != 3:
            raise TraceError(
                f"{context.reason} holds a layer of unknown size ({name}); trace the model without the region"
            )
        out, x, weight = (math.prod(concrete(n) for n in sizes) for sizes in region_sizes(name, *values))
        context.state.fixed_macs += weight * (x if "transpose" in name else out) // context.batch


def region_sizes(name: str, out: Tensor, x: Tensor, weight: Tensor) -> tuple[Any, Any, Any]:
    """Return the sizes whose products are a layer's output positions, input positions and weight elements."""
    if name.startswith("aten.linear"):
        return out.shape[:-1], x.shape[:-1], weight.shape
    return (out.shape[0], *out.shape[2:]), (x.shape[0], *x.shape[2:]), weight.shape


def tensors_in(context: Context, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the label tensors among the arguments; weights that are used as values are labelled."""
    leaves = pytree.tree_leaves((args, kwargs))
    values = [context.state.labels_of(x, context.reason) if isinstance(x, Weight) else x for x in leaves]
    return [x for x in values if isinstance(x, Tensor)]


def operands(context: Context, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the labels of an elementwise operator's operands.

    A parameter that is wide in several dimensions (a map of offsets, one for each channel and pixel) is labelled along
    the dimension that holds the other operands' channels.
    """
    leaves, rank = pytree.tree_leaves((args, kwargs)), len(context.shape)
    across = {dim - x.dim() for x in leaves if isinstance(x, Tensor) for dim in varying_dims(x)}
    found = []
    for leaf in leaves:
        if isinstance(leaf, Weight) and sum(size > 1 for size in leaf.shape) > 1 and len(across) == 1:
            dim = len(leaf.shape) + min(across)
            if dim >= 0 and leaf.shape[dim] == context.shape[rank + min(across)] > 1:
                labels = context.state.fresh_dim(leaf, dim, "channel", context.reason)
                found.append(spread(labels, leaf.shape, dim))
                continue
        found += tensors_in(context, leaf, {})
    return found


def give_up(context: Context, args: Any, kwargs: Any, note: str = "") -> Any:
    """Pin everything that an operator reads and makes, because it is not understood."""
    reason = context.reason + note
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, (Weight, Computed)):
            context.state.locked.setdefault(leaf.name, reason)
    for labels in tensors_in(context, args, kwargs):
        context.state.space.pin(labels, reason)
    return unlabelled_result(context)


def unlabelled_result(context: Context) -> Any:
    """Return a result without prunable channels."""
    if isinstance(context.shape, list):
        return [kept_labels(shape) for shape in context.shape]
    return kept_labels(context.shape) if context.shape is not None else None


# --- elementwise ----------------------------------------------------------------------------------------------------

# Elementwise operators that torch does not tag as such.
ELEMENTWISE = {
    *("dropout", "feature_dropout", "alpha_dropout"),
    *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "gelu"),
    *("silu", "mish", "softplus", "hardswish", "hardsigmoid"),
    *("rsub", "detach", "alias", "to", "_to_copy", "lift_fresh_copy"),
}
RESIDUAL = {"add", "sub"}


@rule("type_as")
def convert(context: Context, x: Tensor, other: Any) -> Tensor:
    """Return the labels of ``x``; the other tensor only gives its dtype."""
    return x


def unite(context: Context, tensors: Sequence[Tensor]) -> Any:
    """Unite the labels that meet; pin an operand that is broadcast over another's channels, as all of them read it."""
    space, rank = context.state.space, len(context.shape or ())
    padded = [t.reshape((1,) * (rank - t.dim()) + tuple(t.shape)) if t.dim() < rank else t for t in tensors]
    across = {dim for t in padded for dim in varying_dims(t)}
    meeting = []
    for labels in padded:
        if any(labels.size(dim) == 1 for dim in across):
            space.pin(labels, f"{context.reason} (broadcast over channels)")
        else:
            meeting.append(labels)
    if not meeting:
        return kept_labels(context.shape)
    result = canonicalise(meeting[0].expand(context.shape))
    for labels in meeting[1:]:
        other = canonicalise(labels.expand(context.shape))
        space.unite(result, other, context.reason)
        if len(varying_dims(other)) > len(varying_dims(result)):
            result = other
    if len(meeting) > 1 and context.operator in RESIDUAL:
        context.state.added.append(core(result).flatten())
    require_box(context, result)
    return result


def require_box(context: Context, labels: Tensor, free: set[int] | None = None) -> None:
    """Require that labels, once united, vary along one dimension only: a tensor has no ragged rows.

    With ``free``, this dimension must be one of them.
    """
    ways = varying_dims(labels)
    if not ways or (len(ways) < 2 and (free is None or free.issuperset(ways))):
        return
    array = core(labels).numpy()

    def fails(classes: IntArray) -> Tensor | None:
        values = classes[array]
        found = [axis for axis in range(values.ndim) if (values != values.take([0], axis)).any()]
        return labels if len(found) > 1 or (free is not None and not free.issuperset(found)) else None

    context.state.checks.append((fails, f"{context.reason} (reshapes its channels)"))
