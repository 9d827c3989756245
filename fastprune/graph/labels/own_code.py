"""What must hold so that the model's own code can move compact tensors: it cuts and splits where it was written to."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune.graph.labels.labels import IntArray, along, core, varying
from fastprune.graph.labels.rules import Context


def computed_dims(context: Context, source: Tensor, result: Tensor) -> set[int] | None:
    """The dimensions along which a reshaped tensor may shrink, None for any.

    Code that splits channels writes ``view(n, groups, c // groups, …)``: the last of the parts follows the channels,
    the others are numbers in the code, and so is all but the -1 where there is one.
    """
    split = varying(source)
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
    written = context.node.args[-1]
    inferred = [i for i, n in enumerate(written) if n == -1] if isinstance(written, (list, tuple)) else []
    return {parts[-1]} | {dim for dim in inferred if dim in parts}


def require_equal(context: Context, source: Tensor, parts: list[Tensor]) -> None:
    """Equal parts of a compact tensor are the compact parts only if each keeps the same pattern of classes."""
    cut = [
        dim
        for dim in varying(source)
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


def require_unmoved(context: Context, source: Tensor, result: Tensor) -> None:
    """A selection may not touch the dimension along which channels lie."""
    vectors = [along(source, dim) for dim in varying(source)], [along(result, dim) for dim in varying(result)]
    if len(vectors[0]) == 1 and len(vectors[1]) == 1:
        before, after = vectors[0][0], vectors[1][0]
        if before is not None and after is not None and torch.equal(before, after):
            return
    context.state.space.pin(source, f"{context.reason} (selects channels)")
    context.state.space.pin(result, f"{context.reason} (selects channels)")
