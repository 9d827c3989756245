"""Conditions for the model's own code to move compact tensors: it must cut and split at the same channels as before."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune.graph.export.nodes import argument_of, cut_places, module_of
from fastprune.graph.labels.labels import IntArray, core, varying_dims, vector_along
from fastprune.graph.labels.rules import Context


def shrinkable_dims(context: Context, source: Tensor, result: Tensor) -> set[int] | None:
    """Return the dimensions along which a reshaped tensor may shrink, None for any.

    Code that splits channels says ``view(n, groups, c // groups, …)``: the last of these parts follows the number of
    channels, the others are numbers in the code. If one part is -1, that part follows it, too. Where heads
    may leave, so does a part that is an attribute of the module, which then changes.
    """
    split = varying_dims(source)
    if len(split) != 1:
        return None
    before, size = source.shape[: split[0]].numel(), source.size(split[0])
    first = next((dim for dim in range(result.dim()) if result.shape[:dim].numel() == before), 0)
    while first < result.dim() and result.size(first) == 1:
        first += 1
    parts = [dim for dim in range(first, result.dim()) if result.size(dim) > 1]
    parts = [dim for dim in parts if result.shape[first : dim + 1].numel() <= size]
    if len(parts) < 2:
        return None
    sizes = context.node.args[-1]
    inferred = [i for i, n in enumerate(sizes) if n == -1] if isinstance(sizes, (list, tuple)) else []
    held = context.state.held.get(module_of(context.node), frozenset()) if context.state.heads else frozenset()
    return {parts[-1]} | {dim for dim in parts if dim in inferred or result.size(dim) in held}


def require_equal(context: Context, source: Tensor, parts: list[Tensor]) -> None:
    """Require that all parts keep the same pattern of classes: else code that cuts equal parts cuts elsewhere."""
    cut = [
        dim
        for dim in varying_dims(source)
        if any(part.dim() != source.dim() or part.size(dim) != source.size(dim) for part in parts)
    ]
    if not cut:
        return
    arrays = [core(part).numpy() for part in parts]

    def fails(classes: IntArray) -> Tensor | None:
        patterns = [classes[array] for array in arrays]
        same = all(p.shape == patterns[0].shape and (p == patterns[0]).all() for p in patterns[1:])
        whole = not any(pattern.any() for pattern in patterns)
        return None if same or whole else source

    context.state.checks.append((fails, f"{context.reason} (cuts its channels)"))


def require_same_parts(context: Context, source: Tensor, parts: list[Tensor]) -> None:
    """Require that code that cuts a value can cut it again: parts of one size lose the same channels.

    ``chunk`` follows the number of channels. Other code names the sizes: each must be an attribute, which then changes.
    """
    held = context.state.held.get(module_of(context.node), frozenset())
    dims = [dim for dim in varying_dims(source) if any(part.size(dim) != source.size(dim) for part in parts)]
    sizes = tuple(part.size(dims[0]) for part in parts) if len(dims) == 1 else ()
    follows = context.operator in ("chunk", "tensor_split") and len(set(sizes)) == 1
    if not sizes or not (follows or sizes in held or held.issuperset(sizes)):
        require_equal(context, source, parts)
        return
    for size in set(sizes):
        first, *others = (part for part in parts if part.size(dims[0]) == size)
        for other in others:
            context.state.space.unite(first, other, f"{context.reason} (cuts its channels)")


def require_unmoved(context: Context, source: Tensor, result: Tensor) -> None:
    """Require that a selection does not touch the dimension that holds the channels; pin them if it does.

    A slice may cut where an attribute of its module says, which then changes.
    """
    held = context.state.held.get(module_of(context.node), frozenset())
    if context.operator == "slice" and argument_of(context.node, "step") == 1:
        dim, places = cut_places(context.node, tuple(source.shape))
        if varying_dims(source) == [dim] and held.issuperset(places):
            return
    if not have_same_channels(source, result):
        context.state.space.pin(source, f"{context.reason} (selects channels)")
        context.state.space.pin(result, f"{context.reason} (selects channels)")


def have_same_channels(source: Tensor, result: Tensor) -> bool:
    """Return whether two values have the same channels in the same order, each along one dimension."""
    vectors = [[vector_along(labels, dim) for dim in varying_dims(labels)] for labels in (source, result)]
    if len(vectors[0]) != 1 or len(vectors[1]) != 1:
        return False
    before, after = vectors[0][0], vectors[1][0]
    return before is not None and after is not None and torch.equal(before, after)
