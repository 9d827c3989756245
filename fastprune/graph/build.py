"""From united labels to units, groups, slices and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

from fastprune.graph.channel_graph import ChannelGraph
from fastprune.graph.cost import CostModel, SlicedDim, terms_of
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.export.tracing import Traced, trace_graphs
from fastprune.graph.labels.interpret import run_on_labels
from fastprune.graph.labels.labels import IntArray
from fastprune.graph.labels.propagate import LabelledDim, Propagation
from fastprune.graph.structure import Group, Layer, Slice
from fastprune.host.spelling import did_you_mean

REMOVED_BY = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}  # hooks of torch.nn.utils


def trace(
    model: nn.Module,
    example_inputs: Example | Inputs,
    *,
    rewrite: bool = True,
    ignore: Sequence[str] = (),
    exact: bool = True,
) -> ChannelGraph:
    """Find the channel groups of a network.

    Args:
        model: any ``nn.Module`` that ``torch.export`` takes. It is not changed; its mode does not matter.
        example_inputs: a batch of inputs, a tuple of them, or a dict of them by the names of ``forward``'s arguments;
            [N, C, H, W] for an image network. Height and width are those that costs are counted for.
        rewrite: whether channels count as prunable that the model's own code could not do without, because it holds
            their number or cuts where they lie (a channel shuffle, ``split(x, [64, 64])``). Surgery then gives back the
            rewritten graph of the network, a ``RewrittenNetwork``, where the code cannot run. False = these channels
            stay, and every compact model has the class of the model.
        ignore: names or patterns (``layer4.*.conv1``) of layers whose output channels stay; a name of a module stands
            for all layers in it.
        exact: whether only channels count as prunable whose removal equals zeroing what reads them. False = channels
            pass operators that bring them together, too (layer norm, statistics over channels, efficient channel
            attention, weight standardisation); ``graph.inexact`` lists these operators, and surgery measures by how
            much the compact network then differs.

    Returns:
        The ``ChannelGraph``.

    Raises:
        TraceError: if the model cannot be exported; names the reason.
        TypeError: if the inputs are no tensors.
        ValueError: for a name or pattern of no layer.

    Example:
        >>> import torch, fastprune as fp
        >>> graph = fp.trace(fp.models.create("resnet20"), torch.zeros(1, 3, 32, 32))
        >>> len(graph.groups), graph.num_units, round(float(graph.cost().macs) / 1e6, 2)
        (10, 352, 40.55)
    """
    traced = trace_graphs(model, example_inputs)
    state = Propagation(exact=exact, rewrites=rewrite)
    run_on_labels(traced.evaluation, traced.inputs, state, record=True)
    if traced.training is not None:
        run_on_labels(traced.training, traced.inputs, state, record=False)
    for pattern in ignore:
        keep_outputs(state, pattern)
    return build(model, traced, state)


def keep_outputs(state: Propagation, pattern: str) -> None:
    """Pin the channels that layers of a name or pattern make."""
    owners = {d.tensor.rpartition(".")[0] for d in state.dims.values()}
    chosen = {name for name in owners if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
    if not chosen:
        modules = {owner.rsplit(".", up)[0] for owner in owners for up in range(owner.count(".") + 1)}
        hint = did_you_mean(pattern, sorted(modules), "; {}")
        raise ValueError(f"ignore {pattern!r}: no layer has such a name{hint}")
    for labelled in state.dims.values():
        if labelled.tensor.rpartition(".")[0] in chosen and labelled.role != "in":
            state.space.pin(labelled.labels, f"ignored ({pattern})")


@dataclass(frozen=True)
class Units:
    """The unit of each label, -1 for none, and where each group's units start."""

    of_label: IntArray
    offsets: IntArray


def build(model: nn.Module, traced: Traced, state: Propagation) -> ChannelGraph:
    """Number the units, gather them into groups and describe both."""
    labelled_dims = list(state.dims.values())
    for labelled in dims_without_producer(state, labelled_dims):
        state.space.pin(labelled.labels, "no convolution or linear layer makes its channels")
    components, reasons = state.settle()
    units = number_units(components, reasons, labelled_dims)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    filters = {c.weight: tuple(buffers[c.weight].shape) for c in state.calls if c.weight in buffers}
    positions: dict[str, int] = {}
    for call in state.calls:
        positions[call.weight] = positions.get(call.weight, 0) + call.positions
    slices = tuple(
        Slice(d.tensor, d.dim, torch.from_numpy(of), d.role, d.computed)
        for d in labelled_dims
        if (of := units.of_label[d.labels.numpy()]).max(initial=-1) >= 0
    )
    offsets = torch.from_numpy(units.offsets)
    # Kernels along the channels, as if filters, one for each channel.
    repeats = {f"{r.node} (node)": (len(r.labels), r.macs) for r in state.repeats}
    repeated = tuple(
        Slice(name, 0, torch.from_numpy(units.of_label[r.labels.numpy()]), "channel")
        for name, r in zip(repeats, state.repeats, strict=True)
    )
    uncounted = filters | repeats
    dims = sliced_dims((*slices, *repeated), units.offsets, shapes | uncounted)
    uses = positions | dict.fromkeys(repeats, 1)
    terms = terms_of(shapes, dims, uses, counted=True) + terms_of(uncounted, dims, uses, counted=False)
    cost = CostModel(offsets, terms, dims, state.fixed_macs)
    layers = tuple(
        Layer(
            c.layer, c.kind, c.weight, c.node,
            torch.from_numpy(units.of_label[c.in_labels.numpy()]),
            torch.from_numpy(units.of_label[c.out_labels.numpy()]),
            c.channel_dim, c.depthwise, c.positions * int(np.prod((shapes | filters)[c.weight])),
            c.positions,
        )
        for c in state.calls
    )  # fmt: skip
    inexact_units, inexact = mixed_units(units, state)
    groups = describe_groups(units, layers, slices, cost, state, inexact_units)
    kept = unprunable(model, state, components, reasons)
    return ChannelGraph(groups, offsets, slices, layers, kept, cost, traced, state.rewrites, inexact_units, inexact)


def mixed_units(units: Units, state: Propagation) -> tuple[Tensor, tuple[str, ...]]:
    """The units that cannot be removed exactly, and the operators that mix them."""
    inexact = torch.zeros(int(units.offsets[-1]), dtype=torch.bool)
    operators: dict[str, None] = {}
    for labels, reason in state.mixed:
        of = units.of_label[labels.numpy()]
        if (of >= 0).any():
            inexact[torch.from_numpy(of[of >= 0])] = True
            operators[reason] = None
    return inexact, tuple(operators)


def dims_without_producer(state: Propagation, dims: list[LabelledDim]) -> list[LabelledDim]:
    """Labels of parameters used elementwise that no layer's channels ever met."""
    components = state.space.components()
    made = {int(c) for d in dims if d.role == "out" for c in np.unique(components[d.labels.numpy()])}
    return [d for d in dims if not made.issuperset(np.unique(components[d.labels.numpy()]).tolist())]


def number_units(components: IntArray, reasons: dict[int, str], dims: list[LabelledDim]) -> Units:
    """Classes that touch the same (tensor, dim) pairs equally often form a group; groups and units keep trace order."""
    prunable = np.zeros(len(components), dtype=bool)
    for d in dims:
        prunable[components[d.labels.numpy()]] = True
    prunable[0] = False
    prunable[list(reasons)] = False
    classes = np.flatnonzero(prunable)
    place = np.full(len(components), -1)
    place[classes] = np.arange(len(classes))
    group = np.zeros(len(classes), dtype=np.int64)
    count = 1
    for d in dims:  # only what a dimension touches is split, as most dimensions touch few classes
        touched, times = np.unique(place[components[d.labels.numpy()]], return_counts=True)
        touched, times = touched[touched >= 0], times[touched >= 0]
        _, split = np.unique(group[touched] * (times.max(initial=0) + 1) + times, return_inverse=True)
        group[touched] = count + split
        count += split.max(initial=-1) + 1
    _, group = np.unique(group, return_inverse=True)
    first_seen = np.full(group.max(initial=-1) + 1, len(components))
    np.minimum.at(first_seen, group, classes)
    order = np.lexsort((classes, first_seen[group]))
    unit_of_class = np.full(len(components), -1)
    unit_of_class[classes[order]] = np.arange(len(classes))
    sizes = np.bincount(group, minlength=len(first_seen))[np.argsort(first_seen)]
    return Units(unit_of_class[components], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def sliced_dims(slices: tuple[Slice, ...], offsets: IntArray, shapes: dict[str, tuple[int, ...]]) -> list[SlicedDim]:
    """How each parameter's dimensions shrink with the groups."""
    dims = []
    for s in slices:
        if s.tensor in shapes:
            units = s.units.numpy()
            held = np.searchsorted(offsets, units[units >= 0], side="right") - 1
            groups, indices = np.unique(held, return_counts=True)
            counts = {int(g): int(n) // int(offsets[g + 1] - offsets[g]) for g, n in zip(groups, indices, strict=True)}
            dims.append(SlicedDim(s.tensor, s.dim, len(units), int((units < 0).sum()), counts))
    return dims


def describe_groups(
    units: Units,
    layers: tuple[Layer, ...],
    slices: tuple[Slice, ...],
    cost: CostModel,
    state: Propagation,
    inexact_units: Tensor,
) -> tuple[Group, ...]:
    """Name each group and say which layers make and read its channels."""
    offsets = units.offsets
    num_groups = len(offsets) - 1

    def groups_of(of: IntArray) -> list[int]:
        return np.unique(np.searchsorted(offsets, of[of >= 0], side="right") - 1).tolist()  # type: ignore[no-any-return]

    producers: list[dict[str, None]] = [{} for _ in range(num_groups)]
    consumers: list[dict[str, None]] = [{} for _ in range(num_groups)]
    touched: list[dict[str, None]] = [{} for _ in range(num_groups)]
    lists = {"out": producers, "in": consumers}
    for s in slices:
        for g in groups_of(s.units.numpy()):
            layer = s.tensor.rpartition(".")[0]
            touched[g][layer] = None
            if s.role in lists:
                lists[s.role][g][layer] = None
    streams = {g for added in state.added for g in groups_of(units.of_label[added.numpy()])}
    sizes = torch.from_numpy(np.diff(offsets)).to(torch.float64)
    without = cost.of_widths(sizes * (1 - torch.eye(num_groups, dtype=torch.float64))).macs
    total = cost.of_widths(sizes).macs
    share = (1 - without / total.clamp(min=1)).tolist()
    return tuple(
        Group(
            name=next(iter(producers[g])), start=int(offsets[g]), size=int(sizes[g]),
            kind="stream" if g in streams else "interior", producers=tuple(producers[g]),
            consumers=tuple(consumers[g]), layers=tuple(touched[g]), share=share[g],
            exact=not bool(inexact_units[int(offsets[g]) : int(offsets[g + 1])].any()),
        )
        for g in range(num_groups)
    )  # fmt: skip


def unprunable(
    model: nn.Module, state: Propagation, components: IntArray, reasons: dict[int, str]
) -> tuple[tuple[str, str], ...]:
    """Every convolution and linear layer with output channels that always stay, and why."""
    listed: dict[str, str] = {}
    for call in state.calls:
        pinned = [c for c in np.unique(components[call.out_labels.numpy()]).tolist() if c == 0 or c in reasons]
        if pinned and call.layer not in listed:
            listed[call.layer] = reasons.get(pinned[0], "reads the input of the network channel by channel")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen = {id(parameters[d.tensor]) for d in state.dims.values() if d.tensor in parameters}
    for name, module in model.named_modules():
        if (
            isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
            and id(module._parameters.get("weight")) not in seen
        ):
            listed.setdefault(name, state.locked.get(f"{name}.weight", why_unread(name, module)))
    return tuple(listed.items())


def why_unread(name: str, module: nn.Module) -> str:
    """Why no operator reads the weight of a layer as it is, and what makes it a plain parameter."""
    if is_parametrized(module, "weight"):
        kinds = ", ".join(type(p).__name__.lstrip("_") for p in module.parametrizations["weight"])  # type: ignore[index]
        remove = f"torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule({name!r}), 'weight')"
        return f"its weight is parametrised ({kinds}); {remove} makes it a plain one"
    for hook in module._forward_pre_hooks.values():
        known = REMOVED_BY.get(type(hook).__name__) or ("prune.remove" if isinstance(hook, BasePruningMethod) else None)
        if known is not None and "weight" not in module._parameters:
            arguments = f"model.get_submodule({name!r}), 'weight'"
            return f"its weight is computed by a hook; torch.nn.utils.{known}({arguments}) makes it a plain one"
    if "weight" not in module._parameters:
        return "its weight is no parameter"
    return "never reached in the traced graph, or its weight is not read directly"
