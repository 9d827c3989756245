"""Operators that only move data: they are executed on the labels.

The compact network must be able to make the same move on fewer channels. The model's own code often can: see
``own_code``. If the graph may be rewritten, it is enough that the kept channels of every value form a box, and that a
move which takes some channels takes them along one dimension: see ``selection``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import operator_name
from fastprune.graph.labels.labels import KEPT, canonicalise, core, spread, varying_dims, vector_along
from fastprune.graph.labels.own_code import (
    have_same_channels,
    require_equal,
    require_same_parts,
    require_unmoved,
    shrinkable_dims,
)
from fastprune.graph.labels.propagate import Weight
from fastprune.graph.labels.rules import Context, give_up, require_box, rule
from fastprune.graph.labels.selection import Origin, find_selection
from fastprune.graph.model_state import attribute_of

RESHAPING = {
    *("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "flip", "contiguous", "clone"),
    *("expand", "expand_as", "stack", "cat", "concat", "concatenate", "unbind"),
    *("pixel_shuffle", "pixel_unshuffle"),
}
SPLITTING = {"view", "reshape", "_unsafe_view", "unflatten"}
PARTING = {"chunk", "split", "split_with_sizes", "tensor_split"}
SELECTING = {
    *("slice", "select", "narrow", "roll", "repeat", "tile", "repeat_interleave", "unfold", "channel_shuffle"),
    *("index_select", "index"),
}
JOINING = {"cat", "concat", "concatenate"}
MOVES = RESHAPING | PARTING | SELECTING


@rule(*MOVES)
def move(context: Context, *args: Any, **kwargs: Any) -> Any:
    """Execute an operator on the labels; it only moves data."""
    to_labels = lambda x: context.state.labels_of(x, context.reason) if isinstance(x, Weight) else x  # noqa: E731
    args, kwargs = pytree.tree_map(to_labels, (args, kwargs))
    # Labels have other strides than the values that the exporter saw, so a view may have to be a copy.
    operator: Any = torch.ops.aten.reshape.default if context.operator == "view" else context.node.target
    try:
        result = operator(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError):
        return give_up(context, args, kwargs)
    sources = [x for x in pytree.tree_leaves(args[0]) if isinstance(x, Tensor)]
    result = pytree.tree_map_only(Tensor, canonicalise, result)
    if context.operator in JOINING:
        result = join(context, sources, result)
    if context.state.rewrites:
        require_rewritable(context, operator, args, kwargs, sources, result)
    else:
        require_own_code(context, sources[0], result, args)
    return result


def join(context: Context, parts: list[Tensor], result: Tensor) -> Tensor:
    """Unite the channels of parts that are joined along another dimension (a class token and those of patches)."""
    across = {dim for part in parts for dim in varying_dims(part)}
    if len(across) != 1 or len({part.dim() for part in parts}) != 1:
        return result
    (dim,) = across
    rows = [vector_along(part, dim) for part in parts if part.size(dim) == result.size(dim)]
    if len(rows) < len(parts) or any(row is None for row in rows):
        return result
    first, *others = (row for row in rows if row is not None)
    for other in others:
        context.state.space.unite(first, other, context.reason)
    return spread(first, tuple(result.shape), dim)


@rule("expand_as")
def expand_as(context: Context, x: Any, other: Any) -> Any:
    """Label an expanded tensor; a value common to all channels (a norm over them) leaves with each channel's copy."""
    values = [context.state.labels_of(v, context.reason) if isinstance(v, Weight) else v for v in (x, other)]
    own, channels = values[0].reshape((1,) * (values[1].dim() - values[0].dim()) + tuple(values[0].shape)), values[1]
    if varying_dims(own) or any(own.size(dim) > 1 for dim in varying_dims(channels)):
        return move(context, *values)
    return channels


@rule("index_select", "index")
def index(context: Context, x: Any, *places: Any) -> Any:
    """Take the channels that a constant of the network names; pin if the indices depend on the input."""
    if isinstance(x, Weight) and context.state.heads and len(x.shape) == 2 and is_row_index(places):
        heads = context.state.fresh_dim(x, 1, "channel", context.reason)  # a table with a column for each head
        return spread(heads, context.shape, len(context.shape) - 1)
    x = context.state.labels_of(x, context.reason) if isinstance(x, Weight) else x
    constant = map_arg(context.node.args[1:], lambda node: constant_of(context, node))
    if any(isinstance(place, Node) for place in pytree.tree_leaves(constant)):
        return give_up(context, (x, *places), {})
    return move(context, x, *constant)


def is_row_index(places: tuple[Any, ...]) -> bool:
    """Return whether the arguments of ``index`` or ``index_select`` choose rows, and nothing along other dimensions."""
    if len(places) == 1:
        return isinstance(places[0], (list, tuple)) and len(places[0]) == 1
    return len(places) == 2 and places[0] == 0


def constant_of(context: Context, node: Node) -> Any:
    """Return the integers of a node that is a buffer or a constant of the network, else the node."""
    graph = context.node.graph.owning_module
    while operator_name(node) in ("lift_fresh_copy", "detach", "alias", "clone"):
        node = node.all_input_nodes[0]
    if node.op == "get_attr" and graph is not None:
        value = attribute_of(graph, str(node.target))
        if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_meta:
            return value.cpu()
    return node


def require_own_code(context: Context, source: Tensor, result: Any, args: Any) -> None:
    """Require that the model's own code can run the same operator on the compact tensor; pin the labels if it cannot.

    The kept channels must form a box, and an operator that cuts along the channels must cut at the same channels.
    """
    if isinstance(result, Tensor):
        free = shrinkable_dims(context, source, result) if context.operator in SPLITTING else None
        require_box(context, result, free)
        if context.operator == "channel_shuffle":
            require_equal(context, source, list(source.chunk(args[1], 1)))
        elif context.operator in SELECTING and varying_dims(source):
            require_unmoved(context, source, result)
    elif context.operator in PARTING:
        require_same_parts(context, source, list(result))
    elif context.operator == "unbind":
        require_equal(context, source, list(result))


def require_rewritable(
    context: Context, operator: Any, args: Any, kwargs: Any, sources: list[Tensor], result: Any
) -> None:
    """Require that a rewritten graph can make this move on compact tensors; pin the labels if it cannot.

    A value whose channels lie along several dimensions (a ``view`` in front of a channel shuffle) need not exist in the
    rewritten graph if only moves follow until the channels lie along one dimension again: the end of the chain then
    selects its channels from the beginning.
    """
    state, source = context.state, sources[0]
    parts = [result] if isinstance(result, Tensor) else list(result)
    if not varying_dims(source):
        return
    for part in parts:
        if not varying_dims(part) and part.numel() and int(core(part).flatten()[0]) != KEPT:
            state.space.pin(part, f"{context.reason} (takes a single channel)")
    ragged = any(len(varying_dims(labels)) > 1 for labels in (*sources, *parts))
    if not ragged and not takes_channels(context, source, parts):
        return
    first = (lambda x: [x]) if isinstance(args[0], (list, tuple)) else (lambda x: x)  # one value that is "joined"
    move = lambda x: operator(first(x), *args[1:], **kwargs)  # noqa: E731
    moved = origin_of(context, sources).move(move) if len(sources) == 1 else []
    found = [choice for place, part in zip(moved, parts, strict=False) if (choice := find_selection(place, part.shape))]
    if len(moved) == 1 and len(varying_dims(parts[0])) > 1 and is_only_moved(context.node):
        state.origins[context.node] = moved[0]
    elif len(found) == len(parts):
        state.selections[context.node] = found
    elif ragged:
        for labels in (*sources, *parts):
            require_box(context, labels)
    else:
        give_up(context, args, kwargs)


def origin_of(context: Context, sources: list[Tensor]) -> Origin:
    """Return the origin of a move's source, which is an earlier value if its channels lie along several dimensions."""
    source = context.node.all_input_nodes[0]
    return context.state.origins.get(source) or Origin.identity(source, tuple(sources[0].shape))


def takes_channels(context: Context, source: Tensor, parts: list[Tensor]) -> bool:
    """Return whether an operator takes some of the channels, or takes them in another order."""
    if context.operator not in SELECTING:
        return False
    return context.operator == "channel_shuffle" or not have_same_channels(source, parts[0])


def is_only_moved(node: Node) -> bool:
    """Return whether every reader of a value moves it, and nothing else with it."""

    def moves(user: Node) -> bool:
        return operator_name(user) in MOVES and user.all_input_nodes[0] is node and isinstance(user.args[0], Node)

    return all(moves(user) for user in node.users)
