"""Products of matrices and attention: where a dimension holds heads, each head leaves as a whole.

The product of a head's queries and keys sums over its channels, and softmax mixes its scores, so that a head needs all
of its channels; the heads themselves never meet before the layer that reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastprune.graph.labels.labels import canonicalise, varying_dims
from fastprune.graph.labels.propagate import Weight
from fastprune.graph.labels.rules import Context, give_up, require_box, rule


@rule("matmul", "bmm")
def product(context: Context, x: Tensor, y: Tensor) -> Any:
    """Label a product of matrices; the channels are rows or columns and the sums run over other dimensions.

    Where both operands have heads, these are its channels.
    """
    weighted = any(isinstance(value, Weight) for value in (x, y))
    if weighted or min(x.dim(), y.dim()) < 2 or not isinstance(context.shape, tuple):
        return give_up(context, (x, y), {})
    if x.dim() - 1 in varying_dims(x) or y.dim() - 2 in varying_dims(y) or (varying_dims(x) and varying_dims(y)):
        heads = unite_heads(context, (x, y))
        return give_up(context, (x, y), {}) if heads is None else canonicalise(heads.expand(context.shape))
    source, along_sum = (x, -1) if varying_dims(x) else (y, -2)
    padded = source.reshape((1,) * (len(context.shape) - source.dim()) + tuple(source.shape))
    if any(padded.size(dim) != context.shape[dim] for dim in varying_dims(padded)):
        return give_up(context, (x, y), {})
    result = canonicalise(padded.narrow(along_sum, 0, 1).expand(context.shape))
    require_box(context, result)
    return result


@rule("scaled_dot_product_attention")
def attention(
    context: Context, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *rest: Any, **options: Any
) -> Any:
    """Label the results of heads; a mask of its own for each head (of relative positions, say) leaves with it."""
    mask = options.pop("attn_mask", mask)
    operands: list[Any] = [query, key, value, *([] if mask is None else [mask])]
    if any(isinstance(x, Weight) for x in operands) or not isinstance(context.shape, tuple):
        return give_up(context, operands, {})
    heads = unite_heads(context, (query, key, value))
    if heads is None:
        return give_up(context, operands, {})
    if mask is not None:
        padded = mask.reshape((1,) * (heads.dim() - mask.dim()) + tuple(mask.shape))
        own = padded.narrow(-1, 0, 1).narrow(-2, 0, 1)
        matrix = {heads.dim() - 2, heads.dim() - 1} & set(varying_dims(padded))
        if matrix:
            return give_up(context, operands, {})
        if all(own.size(dim) == heads.size(dim) for dim in varying_dims(heads)):
            context.state.space.unite(heads, own.expand(heads.shape), context.reason)
    return canonicalise(heads.expand(context.shape))


def unite_heads(context: Context, operands: Sequence[Tensor]) -> Tensor | None:
    """Unite the channels of each head, in all operands.

    Args:
        context: the operator.
        operands: batches of matrices, [..., rows, columns]; the dimensions in front hold the heads.

    Returns:
        The labels of the heads, [..., 1, 1]; None if heads stay, or the operands have none, or different numbers.
    """
    if not context.state.heads:
        return None
    rank, batches = operands[0].dim(), {tuple(x.shape[:-2]) for x in operands}
    ways = {dim for x in operands for dim in varying_dims(x) if dim < x.dim() - 2}
    if rank < 3 or len(batches) != 1 or not ways or not all(varying_dims(x) for x in operands):
        return None
    found: list[Tensor] = []
    for x in operands:
        for dim in {rank - 2, rank - 1} & set(varying_dims(x)):
            context.state.space.unite(x.narrow(dim, 0, 1).expand_as(x), x, context.reason)
        require_box(context, x)
        found.append(canonicalise(x.narrow(-1, 0, 1).narrow(-2, 0, 1)))
    for other in found[1:]:
        context.state.space.unite(found[0], other, context.reason)
    return found[0]
