"""Convolutions and linear layers: they read channels along one dimension of the weight, make others along another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastprune.graph.labels.labels import core, spread, varying_dims, vector_along
from fastprune.graph.labels.propagate import Call, Computed, Repeats, Weight
from fastprune.graph.labels.rules import Context, give_up, rule


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(context: Context, x: Tensor, weight: Any, bias: Any = None, *rest: Any, **options: Any) -> Any:
    """Label the input channels along one dimension of the weight, the output channels along the other."""
    kind = context.operator
    position = 5 if kind == "convolution" else 3
    groups = int(options.get("groups", rest[position] if len(rest) > position else 1))
    transposed = "transpose" in kind or (kind == "convolution" and bool(rest[3]))
    batched = x.dim() == len(weight.shape)  # one dimension fewer: an image without a batch
    channels = vector_along(x, 1) if batched else None
    uses = (tuple(x.shape) if transposed else context.shape, weight.shape[1:])
    if not transposed and runs_along_channels(context, x, weight, options.get("stride", rest[0] if rest else 1)):
        return along_channels(context, x, weight, bias)
    if not is_weight(weight) or channels is None or isinstance(bias, Tensor):
        return give_up_layer(context, (x, weight, bias), uses)
    depthwise = groups == channels.numel() > 1
    out = label_filters(context, weight, channels, groups, transposed=transposed, depthwise=depthwise)
    if isinstance(bias, Weight):
        context.state.label_dim(bias, 0, out, "channel", context.reason)
    pixels = x.shape[2:].numel() if transposed else torch.Size(context.shape[2:]).numel()
    record_call(
        context, weight, pixels * x.shape[0] // context.batch, channels, out, channel_dim=1, depthwise=depthwise
    )
    return spread(out, context.shape, 1)


def label_filters(
    context: Context, weight: Weight | Computed, channels: Tensor, groups: int, *, transposed: bool, depthwise: bool
) -> Tensor:
    """Label a convolution's weight, which reads ``channels``; return the labels of its output channels."""
    reads, makes = (0, 1) if transposed else (1, 0)
    state = context.state
    if depthwise:
        out = channels.repeat_interleave(weight.shape[1] if transposed else weight.shape[0] // groups)
        state.label_dim(weight, 0, channels if transposed else out, "depthwise", context.reason)
    elif groups > 1:
        rows = channels.reshape(groups, -1)
        state.space.unite(rows[:1].expand_as(rows), rows, f"{context.reason} (grouped)")
        if transposed:  # the weight holds the channels of all groups along one dimension, of one group along the other
            state.label_dim(weight, reads, channels, "in", context.reason)
            out = state.fresh_dim(weight, makes, "out", context.reason).repeat(groups)
        else:
            state.label_dim(weight, reads, rows[0], "in", context.reason)
            out = state.fresh_dim(weight, makes, "out", context.reason, repeat=groups)
    else:
        state.label_dim(weight, reads, channels, "in", context.reason)
        out = state.fresh_dim(weight, makes, "out", context.reason)
    return out


def is_weight(weight: Any) -> bool:
    """Return whether the channels of a layer's weight are known: it is a parameter, or computed from one."""
    return isinstance(weight, Weight) or (isinstance(weight, Computed) and weight.is_weight)


def runs_along_channels(context: Context, x: Tensor, weight: Any, stride: Any) -> bool:
    """Return whether a convolution may run along channels (efficient channel attention) and keeps their number."""
    across = varying_dims(x)
    if not isinstance(weight, Weight) or len(across) != 1 or across[0] < 2 or x.dim() != len(weight.shape):
        return False
    strides = [stride] if isinstance(stride, int) else list(stride)
    same = x.size(across[0]) == context.shape[across[0]] and strides[min(across[0] - 2, len(strides) - 1)] == 1
    return same and context.state.let_mix(x, context.reason)


def along_channels(context: Context, x: Tensor, weight: Weight, bias: Any) -> Tensor:
    """Let each channel read its neighbours; the kernel stays, and is used once for each channel that is left."""
    dim = varying_dims(x)[0]
    for kept in (weight, bias):
        if isinstance(kept, Weight):
            context.state.locked.setdefault(kept.name, context.reason)
    if context.record:
        uses = math.prod(context.shape) // context.shape[dim] * math.prod(weight.shape[1:]) // context.batch
        context.state.repeats.append(Repeats(context.node.name, core(x).flatten(), uses))
    return spread(core(x).flatten(), context.shape, dim)


@rule("linear")
def linear(context: Context, x: Tensor, weight: Any, bias: Any = None) -> Any:
    """Label the channels along the last dimension."""
    channels = vector_along(x, x.dim() - 1)
    if not is_weight(weight) or channels is None or (isinstance(bias, Tensor) and bias.dim() != 1):
        return give_up_layer(context, (x, weight, bias), (context.shape, weight.shape[1:]))
    state = context.state
    state.label_dim(weight, 1, channels, "in", context.reason)
    out = state.fresh_dim(weight, 0, "out", context.reason)
    if isinstance(bias, Weight):
        state.label_dim(bias, 0, out, "channel", context.reason)
    elif isinstance(bias, Tensor):  # joined from several parameters, say
        state.space.unite(out, core(bias).expand(bias.shape), context.reason)
    record_call(
        context, weight, x.shape[:-1].numel() // context.batch, channels, out, channel_dim=x.dim() - 1, depthwise=False
    )
    return spread(out, context.shape, len(context.shape) - 1)


def give_up_layer(context: Context, args: Any, uses: tuple[Sequence[int], Sequence[int]]) -> Any:
    """Keep all channels of a layer and count its MACs, the product of the shapes ``uses``, as fixed."""
    if context.record:
        context.state.fixed_macs += math.prod(uses[0]) * math.prod(uses[1]) // context.batch
    computed = not isinstance(args[1], Weight)
    return give_up(context, args, {}, " (its weight is computed)" if computed else "")


def record_call(
    context: Context,
    weight: Weight | Computed,
    positions: int,
    reads: Tensor,
    makes: Tensor,
    *,
    channel_dim: int,
    depthwise: bool,
) -> None:
    """Record the use of a convolution or linear layer in the graph that is costed and masked."""
    if context.record:
        call = Call(
            layer=weight.layer, kind=context.operator, weight=weight.name, positions=positions, node=context.node.name,
            in_labels=reads, out_labels=makes, channel_dim=channel_dim, depthwise=depthwise,
        )  # fmt: skip
        context.state.calls.append(call)
