"""Operators that work on each channel by itself: padding, pooling, reductions, normalisation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import module_of
from fastprune.graph.labels.labels import canonicalise, core, kept_labels, varying_dims, vector_along
from fastprune.graph.labels.propagate import Weight
from fastprune.graph.labels.rules import SIZES, Context, give_up, require_box, rule, unlabelled_result


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def pad(context: Context, x: Tensor, amounts: Sequence[int], *rest: Any, **options: Any) -> Tensor:
    """Label a padded tensor: padding around pixels belongs to the channel, padded channels stay."""
    padded = [x.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    if any(dim in varying_dims(x) for dim in padded):
        if context.operator not in ("constant_pad_nd", "pad") or min(amounts) < 0:
            return give_up(context, (x,), {})  # type: ignore[no-any-return]
        return canonicalise(torch.constant_pad_nd(x, list(amounts), 0))
    return resize(context, x)


def resize(context: Context, x: Tensor) -> Tensor:
    """Return the same channels with other sizes of the dimensions along which labels do not vary."""
    if any(x.size(dim) != context.shape[dim] for dim in varying_dims(x)):
        return give_up(context, (x,), {})  # type: ignore[no-any-return]
    return canonicalise(core(x).expand(context.shape))


POOLS = [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)]
UPSAMPLES = [
    f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "bicubic2d", "trilinear3d")
]


@rule(*POOLS, *UPSAMPLES, "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d", "zeros_like", "ones_like")
def spatial(context: Context, x: Tensor, *rest: Any, **options: Any) -> Any:
    """Label the result of an operator that works on each channel by itself, along dimensions 2 and up."""
    pixels = re.search("([123])d", context.operator)  # one dimension fewer: an image without a batch
    unbatched = pixels is not None and x.dim() != int(pixels.group(1)) + 2
    if unbatched or any(dim > 1 for dim in varying_dims(x)) or not isinstance(context.shape, tuple):
        return give_up(context, (x, rest), options)
    return resize(context, x)


@rule("torchvision::roi_align")
def roi_align(context: Context, x: Tensor, boxes: Tensor, *rest: Any, **options: Any) -> Any:
    """Label crops [K, C, …] of boxes in images [N, C, …]: each channel is cropped by itself."""
    if set(varying_dims(x)) - {1} or (isinstance(boxes, Tensor) and varying_dims(boxes)):
        return give_up(context, (x, boxes, rest), options)
    return resize(context, x)


@rule("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "var_mean", "std_mean")
def reduce(context: Context, x: Tensor, dims: Any = None, *rest: Any, **options: Any) -> Any:
    """Label the result of a reduction; channels that it brings together can only leave together."""
    if context.shape is None:
        return give_up(context, (x,), {})
    named = isinstance(dims, (int, list, tuple)) and not isinstance(dims, bool) and dims != []  # a flag: all
    chosen = pytree.tree_leaves(dims) if named else range(x.dim())
    reduced = {int(dim) % x.dim() for dim in chosen}
    if not mix(context, x, reduced):
        return unlabelled_result(context) if let_mix(context, x) else give_up(context, (x,), {})
    index = tuple(0 if dim in reduced else slice(None) for dim in range(x.dim()))
    if isinstance(context.shape, list):
        return [canonicalise(x[index].reshape(shape)) for shape in context.shape]
    return canonicalise(x[index].reshape(context.shape))


@rule("linalg_vector_norm", "norm")
def norm(context: Context, x: Tensor, order: Any = 2, dims: Any = None, *rest: Any, **options: Any) -> Any:
    """Label the result of a norm, which is a reduction, too."""
    return reduce(context, x, dims)


@rule("softmax", "log_softmax", "_softmax", "cumsum")
def softmax(context: Context, x: Tensor, dim: int, *rest: Any, **options: Any) -> Any:
    """Label the result of an operator that mixes values along one dimension."""
    if mix(context, x, {dim % x.dim()}) or (context.operator != "cumsum" and let_mix(context, x)):
        return x
    return give_up(context, (x,), {})


def mix(context: Context, x: Tensor, dims: set[int]) -> bool:
    """Unite the channels that meet along ``dims``; return False if channels differ along these dimensions alone."""
    crossed = dims & set(varying_dims(x))
    if crossed and crossed == set(varying_dims(x)):
        return False
    for dim in crossed:  # in a split attention, say, each channel leaves with its counterparts in all parts
        context.state.space.unite(x.narrow(dim, 0, 1).expand_as(x), x, context.reason)
    if crossed:
        require_box(context, x)
    return True


def let_mix(context: Context, x: Tensor) -> bool:
    """Return whether the channels of ``x`` may leave although their values meet here.

    They may in an inexact trace, and in norms that will count them as zeros.
    """
    exactly = module_of(context.node) in context.state.norms
    if exactly:
        context.state.counted.add(module_of(context.node))
    allowed = exactly or context.state.let_mix(x, context.reason)
    if allowed:
        require_box(context, x)
    return allowed


def follow(context: Context, parameters: Iterable[Any], channels: Tensor, dim: int = 0) -> None:
    """Assign a normalisation's scale, shift and statistics to its channels, along their dimension ``dim``."""
    for weight in parameters:
        if isinstance(weight, Weight):
            context.state.label_dim(weight, dim, channels, "channel", context.reason)
        elif isinstance(weight, Tensor):
            context.state.space.unite(channels, vector_along(weight, dim), context.reason)  # type: ignore[arg-type]


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(context: Context, x: Tensor, *parameters: Any, **options: Any) -> Any:
    """Normalise each channel by itself; its scale, shift and statistics go with it."""
    channels = vector_along(x, 1)
    if channels is None:
        if standardises(context, x) and let_mix(context, x):
            return x
        return give_up(context, (x, parameters), options)
    follow(context, (*parameters, *options.values()), channels)
    return x if isinstance(context.shape, tuple) else [x, *map(kept_labels, context.shape[1:])]


def standardises(context: Context, x: Tensor) -> bool:
    """Return whether a batch norm computes statistics over the dimensions that hold labels (those of a weight, say)."""
    arguments = context.node.args
    training = context.operator == "batch_norm" and len(arguments) > 5 and bool(arguments[5])
    return training and 1 not in varying_dims(x)


@rule("group_norm")
def group_norm(context: Context, x: Tensor, groups: int, *parameters: Any, **options: Any) -> Any:
    """Normalise the channels of each group together, so that a group leaves as a whole; a single group stays."""
    channels = vector_along(x, 1)
    if channels is None or (groups == 1 and not let_mix(context, x)):
        return give_up(context, (x, parameters), options)
    if groups > 1:
        rows = channels.reshape(groups, -1)
        context.state.space.unite(rows[:, :1].expand_as(rows), rows, context.reason)
    follow(context, (*parameters, *options.values()), channels)
    return x


@rule("layer_norm", "rms_norm")
def layer_norm(context: Context, x: Tensor, shape: Sequence[int], *parameters: Any, **options: Any) -> Any:
    """Normalise over the last dimensions; channels that lie there alone each change the statistics of all."""
    across, first = varying_dims(x), x.dim() - len(shape)
    if context.state.heads and across and across[0] < first:  # heads, each of which is normalised by itself
        mix(context, x, set(range(first, x.dim())))
        return x
    if len(across) != 1 or across[0] < first or not let_mix(context, x):
        return give_up(context, (x, parameters), options)
    follow(context, (*parameters, *options.values()), core(x).flatten(), across[0] - first)
    return x


@rule("_weight_norm")
def weight_norm(context: Context, v: Tensor, g: Any, dim: int = 0) -> Any:
    """Label a weight that is computed from a parameter: ``g v / ‖v‖``, the norm over all dimensions but one."""
    if set(varying_dims(v)) <= {dim % v.dim()}:
        follow(context, [g], core(v).flatten(), dim) if varying_dims(v) else None
        return v
    return v if let_mix(context, v) else give_up(context, (v, g), {})


@rule("new_ones", "new_zeros", "new_full", "new_empty")
def make_new(context: Context, x: Tensor, *rest: Any, **options: Any) -> Any:
    """Label a new tensor, which has only the dtype and the device of ``x``."""
    return kept_labels(context.shape)


@rule(*SIZES)
def size_of(context: Context, x: Tensor | Weight, dim: int | None = None) -> int:
    """Return the size on the example."""
    return x.shape[dim] if dim is not None else torch.Size(x.shape).numel()


@rule("prelu")
def prelu(context: Context, x: Tensor, slope: Any) -> Any:
    """Label the slope: one per channel (dimension 1), or one for all."""
    channels = vector_along(x, 1)
    if channels is None or not isinstance(slope, Weight):
        return give_up(context, (x, slope), {})
    if slope.shape[0] > 1:
        context.state.label_dim(slope, 0, channels, "channel", context.reason)
    return x
