"""What each operator does to labels.

Convolutions, linear layers, normalisations by channel, pooling and reductions have a rule each. Operators that only
move data are executed on the labels. Elementwise operators unite what meets. Everything else pins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fastprune.graph.labels import IntArray, along, canonical, core, kept, spread, varying
from fastprune.graph.propagate import Call, Propagation, Weight
from fastprune.graph.tracing import TraceError, concrete


@dataclass(frozen=True)
class Context:
    """Where a rule is applied: the findings so far, the node, its module, and the shape (or shapes) of its result."""

    state: Propagation
    node: Node
    module: str
    batch: int
    shape: Any
    record: bool

    @property
    def operator(self) -> str:
        """The operator's name without namespace, overload and the underscore of in-place variants."""
        schema = getattr(self.node.target, "_schema", None)
        name = str(schema.name).rpartition("::")[2] if schema else getattr(self.node.target, "__name__", "?")
        return name if name.startswith("_") else name.rstrip("_")

    @property
    def reason(self) -> str:
        """For people: the operator and the module."""
        return f"{self.operator} in {self.module or 'the model'}"


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply_rule(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The labels of an operator's result."""
    if isinstance(context.node.target, torch._ops.HigherOrderOperator):
        count_region(context)
        return give_up(context, args, kwargs)  # a graph of its own: cond, a region under autocast or no_grad
    if not isinstance(context.node.target, torch._ops.OpOverload):
        return context.node.target(*args, **kwargs)  # type: ignore[operator]  # arithmetic on sizes, getitem
    if context.operator in RULES:
        if args and isinstance(args[0], Weight) and context.operator not in SIZES:
            args = (context.state.labels_of(args[0], context.reason), *args[1:])  # a parameter in an input's place
        return RULES[context.operator](context, *args, **kwargs)
    if context.operator in MOVES:
        return move(context, args, kwargs)
    elementwise = torch.Tag.pointwise in context.node.target.tags or context.operator in ELEMENTWISE
    if elementwise and isinstance(context.shape, tuple):
        return unite(context, tensors_in(context, args, kwargs))
    return give_up(context, args, kwargs)


def count_region(context: Context) -> None:
    """The MACs of layers in a region with a graph of its own; their channels stay, so their cost is fixed.

    Raises:
        TraceError: where the region does not say what size its tensors have.
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
    """The sizes whose products are a layer's positions at its output and its input, and the elements of its weight."""
    if name.startswith("aten.linear"):
        return out.shape[:-1], x.shape[:-1], weight.shape
    return (out.shape[0], *out.shape[2:]), (x.shape[0], *x.shape[2:]), weight.shape


def tensors_in(context: Context, args: Any, kwargs: Any) -> list[Tensor]:
    """The label tensors among the arguments; a weight used as a value is labelled."""
    leaves = pytree.tree_leaves((args, kwargs))
    values = [context.state.labels_of(x, context.reason) if isinstance(x, Weight) else x for x in leaves]
    return [x for x in values if isinstance(x, Tensor)]


def give_up(context: Context, args: Any, kwargs: Any) -> Any:
    """An operator that is not understood: what it reads and what it gives stays as it is."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Weight):
            context.state.locked.setdefault(leaf.name, context.reason)
    for labels in tensors_in(context, args, kwargs):
        context.state.space.pin(labels, context.reason)
    return unlabelled(context)


def unlabelled(context: Context) -> Any:
    """The result without prunable channels."""
    if isinstance(context.shape, list):
        return [kept(shape) for shape in context.shape]
    return kept(context.shape) if context.shape is not None else None


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
    """The other tensor gives its dtype only."""
    return x


def unite(context: Context, tensors: Sequence[Tensor]) -> Any:
    """Unite the labels that meet; an operand broadcast over another's channels is read by all of them and pinned."""
    space, rank = context.state.space, len(context.shape or ())
    padded = [t.reshape((1,) * (rank - t.dim()) + tuple(t.shape)) if t.dim() < rank else t for t in tensors]
    across = {dim for t in padded for dim in varying(t)}
    meeting = []
    for labels in padded:
        if any(labels.size(dim) == 1 for dim in across):
            space.pin(labels, f"{context.reason} (broadcast over channels)")
        else:
            meeting.append(labels)
    if not meeting:
        return kept(context.shape)
    result = canonical(meeting[0].expand(context.shape))
    for labels in meeting[1:]:
        other = canonical(labels.expand(context.shape))
        space.unite(result, other, context.reason)
        if len(varying(other)) > len(varying(result)):
            result = other
    if len(meeting) > 1 and context.operator in RESIDUAL:
        context.state.added.append(core(result).flatten())
    require_box(context, result)
    return result


# --- data movement --------------------------------------------------------------------------------------------------

RESHAPING = {
    *("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "flip", "contiguous", "clone"),
    *("expand", "expand_as", "stack", "cat", "concat", "concatenate", "unbind"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}
SPLITTING = {"view", "reshape", "_unsafe_view", "unflatten"}
PARTING = {"chunk", "split", "split_with_sizes", "tensor_split"}
SELECTING = {"slice", "select", "narrow", "roll", "repeat", "tile", "repeat_interleave", "unfold"}
MOVES = RESHAPING | PARTING | SELECTING


def move(context: Context, args: Any, kwargs: Any) -> Any:
    """Execute an operator that only moves data on the labels.

    The model's own code runs the same operator on the compact tensor, so two things must hold there, or the labels are
    pinned: kept channels form a box, and what cuts along the channels cuts where it cut before.
    """
    to_labels = lambda x: context.state.labels_of(x, context.reason) if isinstance(x, Weight) else x  # noqa: E731
    args, kwargs = pytree.tree_map(to_labels, (args, kwargs))
    # Labels have other strides than the values that the exporter saw, so a view may have to be a copy.
    operator: Any = torch.ops.aten.reshape.default if context.operator == "view" else context.node.target
    try:
        result = operator(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError):
        return give_up(context, args, kwargs)
    source = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    if isinstance(result, Tensor):
        result = canonical(result)
        require_box(context, result, computed_dims(context, source, result) if context.operator in SPLITTING else None)
        if context.operator == "channel_shuffle":
            require_equal(context, source, list(source.chunk(args[1], 1)))
        if context.operator in SELECTING and varying(source):
            require_unmoved(context, source, result)
        return result
    parts = [canonical(part) for part in result]
    if context.operator in PARTING or context.operator == "unbind":
        require_equal(context, source, parts)
    return parts


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


def require_box(context: Context, labels: Tensor, free: set[int] | None = None) -> None:
    """Labels that vary along several dimensions must, once united, vary along one: a tensor has no ragged rows.

    With ``free``, that one must be among them.
    """
    ways = varying(labels)
    if not ways or (len(ways) < 2 and (free is None or free.issuperset(ways))):
        return
    array = core(labels).numpy()

    def fails(classes: IntArray) -> Tensor | None:
        values = classes[array]
        found = [axis for axis in range(values.ndim) if (values != values.take([0], axis)).any()]
        return labels if len(found) > 1 or (free is not None and not free.issuperset(found)) else None

    context.state.checks.append((fails, f"{context.reason} (reshapes its channels)"))


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


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def pad(context: Context, x: Tensor, amounts: Sequence[int], *rest: Any, **options: Any) -> Tensor:
    """Padding around pixels belongs to the channel; padding beside channels adds channels that stay."""
    padded = [x.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    if any(dim in varying(x) for dim in padded):
        if context.operator not in ("constant_pad_nd", "pad") or min(amounts) < 0:
            return give_up(context, (x,), {})  # type: ignore[no-any-return]
        return canonical(torch.constant_pad_nd(x, list(amounts), 0))
    return resize(context, x)


def resize(context: Context, x: Tensor) -> Tensor:
    """The same channels with other extents in the dimensions along which labels do not vary."""
    if any(x.size(dim) != context.shape[dim] for dim in varying(x)):
        return give_up(context, (x,), {})  # type: ignore[no-any-return]
    return canonical(core(x).expand(context.shape))


# --- pooling, reductions, normalisation -----------------------------------------------------------------------------

POOLS = [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)]
UPSAMPLES = [
    f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "bicubic2d", "trilinear3d")
]


@rule(*POOLS, *UPSAMPLES, "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d", "zeros_like", "ones_like")
def spatial(context: Context, x: Tensor, *rest: Any, **options: Any) -> Any:
    """Works on each channel by itself, along dimensions 2 and up."""
    pixels = re.search("([123])d", context.operator)  # one dimension fewer: a single image without a batch
    unbatched = pixels is not None and x.dim() != int(pixels.group(1)) + 2
    if unbatched or any(dim > 1 for dim in varying(x)) or not isinstance(context.shape, tuple):
        return give_up(context, (x, rest), options)
    return resize(context, x)


@rule("mean", "sum", "amax", "amin", "var", "std", "logsumexp")
def reduce(context: Context, x: Tensor, dims: Any = None, *rest: Any, **options: Any) -> Any:
    """A reduction over dimensions in which labels do not vary."""
    if not isinstance(context.shape, tuple):
        return give_up(context, (x,), {})
    named = isinstance(dims, (int, list, tuple)) and not isinstance(dims, bool) and dims != []  # a flag: all of them
    chosen = pytree.tree_leaves(dims) if named else range(x.dim())
    reduced = {int(dim) % x.dim() for dim in chosen}
    if reduced & set(varying(x)):
        return give_up(context, (x,), {})
    index = tuple(0 if dim in reduced else slice(None) for dim in range(x.dim()))
    return canonical(x[index].reshape(context.shape))


@rule("softmax", "log_softmax", "_softmax", "cumsum")
def along_one(context: Context, x: Tensor, dim: int, *rest: Any, **options: Any) -> Any:
    """Mixes values along one dimension only."""
    return give_up(context, (x,), {}) if dim % x.dim() in varying(x) else x


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(context: Context, x: Tensor, *parameters: Any, **options: Any) -> Any:
    """Each channel by itself; its scale, shift and statistics go with it."""
    channels = along(x, 1)
    if channels is None:
        return give_up(context, (x, parameters), options)
    for weight in (*parameters, *options.values()):
        if isinstance(weight, Weight):
            context.state.label_dim(weight, 0, channels, "channel", context.reason)
        elif isinstance(weight, Tensor):
            context.state.space.unite(channels, along(weight, 0), context.reason)  # type: ignore[arg-type]
    return x if isinstance(context.shape, tuple) else [x, *map(kept, context.shape[1:])]


SIZES = {"sym_size", "sym_numel"}


@rule(*SIZES)
def size_of(context: Context, x: Tensor | Weight, dim: int | None = None) -> int:
    """Sizes are those of the example."""
    return x.shape[dim] if dim is not None else torch.Size(x.shape).numel()


@rule("prelu")
def prelu(context: Context, x: Tensor, slope: Any) -> Any:
    """A slope per channel (dimension 1), or one for all."""
    channels = along(x, 1)
    if channels is None or not isinstance(slope, Weight):
        return give_up(context, (x, slope), {})
    if slope.shape[0] > 1:
        context.state.label_dim(slope, 0, channels, "channel", context.reason)
    return x


# --- convolution and linear -----------------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(context: Context, x: Tensor, weight: Any, bias: Any = None, *rest: Any, **options: Any) -> Any:
    """Reads input channels along one dimension of the weight, makes output channels along the other."""
    kind = context.operator
    position = 5 if kind == "convolution" else 3
    groups = int(options.get("groups", rest[position] if len(rest) > position else 1))
    transposed = "transpose" in kind or (kind == "convolution" and bool(rest[3]))
    channels = along(x, 1) if x.dim() == len(weight.shape) else None  # one dimension fewer: an image without a batch
    uses = (tuple(x.shape) if transposed else context.shape, weight.shape[1:])
    if not isinstance(weight, Weight) or channels is None or isinstance(bias, Tensor):
        return give_up_layer(context, (x, weight, bias), uses)
    reads, makes = (0, 1) if transposed else (1, 0)
    state, depthwise = context.state, groups == channels.numel() > 1
    if transposed and groups > 1 and not depthwise:
        return give_up_layer(context, (x, weight, bias), uses)
    if depthwise:
        out = channels.repeat_interleave(weight.shape[1] if transposed else weight.shape[0] // groups)
        state.label_dim(weight, 0, out, "depthwise", context.reason)
    elif groups > 1:
        rows = channels.reshape(groups, -1)
        state.space.unite(rows[:1].expand_as(rows), rows, f"{context.reason} (grouped)")
        state.label_dim(weight, reads, rows[0], "in", context.reason)
        out = state.fresh_dim(weight, makes, "out", context.reason, repeat=groups)
    else:
        state.label_dim(weight, reads, channels, "in", context.reason)
        out = state.fresh_dim(weight, makes, "out", context.reason)
    if isinstance(bias, Weight):
        state.label_dim(bias, 0, out, "channel", context.reason)
    pixels = x.shape[2:].numel() if transposed else torch.Size(context.shape[2:]).numel()
    record_call(
        context, weight, pixels * x.shape[0] // context.batch, channels, out, channel_dim=1, depthwise=depthwise
    )
    return spread(out, context.shape, 1)


@rule("linear")
def linear(context: Context, x: Tensor, weight: Any, bias: Any = None) -> Any:
    """The last dimension holds the channels."""
    channels = along(x, x.dim() - 1)
    if not isinstance(weight, Weight) or channels is None or isinstance(bias, Tensor):
        return give_up_layer(context, (x, weight, bias), (context.shape, weight.shape[1:]))
    state = context.state
    state.label_dim(weight, 1, channels, "in", context.reason)
    out = state.fresh_dim(weight, 0, "out", context.reason)
    if isinstance(bias, Weight):
        state.label_dim(bias, 0, out, "channel", context.reason)
    record_call(
        context, weight, x.shape[:-1].numel() // context.batch, channels, out, channel_dim=x.dim() - 1, depthwise=False
    )
    return spread(out, context.shape, len(context.shape) - 1)


def give_up_layer(context: Context, args: Any, uses: tuple[Sequence[int], Sequence[int]]) -> Any:
    """A layer that stays as it is costs what it costs: ``uses`` are the shapes whose product counts its MACs."""
    if context.record:
        context.state.fixed_macs += math.prod(uses[0]) * math.prod(uses[1]) // context.batch
    return give_up(context, args, {})


def record_call(
    context: Context, weight: Weight, positions: int, reads: Tensor, makes: Tensor, *, channel_dim: int, depthwise: bool
) -> None:
    """Remember the use of a convolution or linear layer in the graph that is costed and masked."""
    if context.record:
        call = Call(
            layer=weight.layer, kind=context.operator, weight=weight.name, positions=positions, node=context.node.name,
            in_labels=reads, out_labels=makes, channel_dim=channel_dim, depthwise=depthwise,
        )  # fmt: skip
        context.state.calls.append(call)
