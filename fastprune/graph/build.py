"""Trace a network: its graphs, the labels that flow through them, and the ``ChannelGraph`` that is built of both."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fastprune.graph.channel_graph import ChannelGraph
from fastprune.graph.description import describe_cost, describe_groups, describe_layers, describe_slices, weight_shapes
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.export.nodes import module_of
from fastprune.graph.export.tracing import Traced, trace_graphs
from fastprune.graph.held_sizes import find_held_sizes, holders_of
from fastprune.graph.labels.interpret import run_on_labels
from fastprune.graph.labels.propagate import Propagation
from fastprune.graph.norms import describe_norms, find_norms, label_norms
from fastprune.graph.structure import Norm
from fastprune.graph.units import find_inexact, number_units, unmade_dims
from fastprune.graph.unprunable import list_unprunable
from fastprune.host.spelling import did_you_mean


def trace(
    model: nn.Module,
    example_inputs: Example | Inputs,
    *,
    rewrite: bool = True,
    ignore: str | nn.Module | Sequence[str | nn.Module] = (),
    exact: bool = True,
    replace_norms: bool = False,
    heads: bool = False,
) -> ChannelGraph:
    """Find the channel groups of a network, as ``fastprune.trace`` does.

    With ``rewrite=False`` it is not tried whether the model's own code runs on fewer channels: ``surgery.trace`` does.

    Args:
        model: the network.
        example_inputs: a batch of inputs.
        rewrite: whether channels are prunable that only a rewritten graph can remove.
        ignore: layers whose output channels stay.
        exact: whether a channel is prunable only if its removal equals zeroing it where it is read.
        replace_norms: whether channels are prunable that norms mix, if these may become ones that count them as zeros.
        heads: whether whole heads of attention are prunable.
    """
    traced = trace_graphs(model, example_inputs)
    return label(model, traced, rewrite=rewrite, ignore=ignore, exact=exact, replace_norms=replace_norms, heads=heads)


def label(
    model: nn.Module,
    traced: Traced,
    *,
    rewrite: bool,
    ignore: str | nn.Module | Sequence[str | nn.Module],
    exact: bool,
    replace_norms: bool = False,
    heads: bool = False,
    whole: Collection[str] = (),
) -> ChannelGraph:
    """Find the channel groups in the graphs of a network.

    Args:
        model: as in ``trace``.
        traced: its graphs.
        rewrite: as in ``trace``.
        ignore: as in ``trace``.
        exact: as in ``trace``.
        replace_norms: as in ``trace``.
        heads: as in ``trace``.
        whole: modules whose code needs all channels of what it reads and makes; ``name.*`` stands for all modules
            inside.
    """
    patterns = layer_names(model, ignore)
    held = {name: frozenset(values.values()) for name, values in holders_of(model).items()}
    graphs = [graph for graph in (traced.evaluation, traced.training) if graph is not None]
    norms = find_norms(model, graphs) if replace_norms else {}
    state = Propagation(exact=exact, rewrites=rewrite, held=held, norms=norms, heads=heads)
    labels = run_on_labels(traced.evaluation, traced.inputs, state, record=True)
    if traced.training is not None:
        labels |= run_on_labels(traced.training, traced.inputs, state, record=False)
    for pattern in patterns:
        keep_outputs(state, pattern)
    for node, value in labels.items():
        if node.op == "call_function" and any(fnmatchcase(module_of(node), pattern) for pattern in whole):
            for labelled in pytree.tree_leaves((value, [labels[source] for source in node.all_input_nodes])):
                if isinstance(labelled, Tensor):
                    state.space.pin(labelled, f"the code of {module_of(node) or 'the model'} (needs all channels)")
    return build(model, traced, state, labels, norms)


def layer_names(model: nn.Module, layers: object) -> list[str]:
    """Return the names or patterns of layers that a user gives by name or as modules; a single one needs no list.

    Raises:
        TypeError: for anything else.
        ValueError: for a module that is not in the model.
    """
    given = [layers] if isinstance(layers, (str, nn.Module)) else layers
    if not isinstance(given, Iterable):
        raise TypeError(f"ignore: got {type(layers).__name__}; names of layers or modules are needed")
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for layer in given:
        if isinstance(layer, nn.Module):
            if not names.get(id(layer)):
                raise ValueError(f"ignore: {type(layer).__name__} is no module inside the model; give one, or its name")
            found.append(names[id(layer)])
        elif isinstance(layer, str):
            found.append(layer)
        else:
            raise TypeError(f"ignore: got {type(layer).__name__}; the name of a layer or a module is needed")
    return found


def keep_outputs(state: Propagation, pattern: str) -> None:
    """Pin the output channels of the layers that a name or pattern fits."""
    owners = {d.tensor.rpartition(".")[0] for d in state.dims.values()}
    chosen = {name for name in owners if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
    if not chosen:
        modules = {owner.rsplit(".", up)[0] for owner in owners for up in range(owner.count(".") + 1)}
        hint = did_you_mean(pattern, sorted(modules), "; {}")
        raise ValueError(f"ignore {pattern!r}: no layer has such a name{hint}")
    for labelled in state.dims.values():
        if labelled.tensor.rpartition(".")[0] in chosen and labelled.role != "in":
            state.space.pin(labelled.labels, f"ignored ({pattern})")


def build(
    model: nn.Module, traced: Traced, state: Propagation, labels: Mapping[Node, Any], norms: Mapping[str, Norm]
) -> ChannelGraph:
    """Number the units, gather them into groups and describe both.

    Args:
        model: the model.
        traced: its graphs.
        state: the findings about them.
        labels: the labels of their values.
        norms: the norms that may lose channels exactly.
    """
    graphs = [graph for graph in (traced.evaluation, traced.training) if graph is not None]
    normalised = label_norms(norms, graphs, labels, state)
    labelled_dims = list(state.dims.values())
    for labelled in unmade_dims(state, labelled_dims):
        state.space.pin(labelled.labels, "no convolution or linear layer makes its channels")
    components, reasons = state.settle()
    units = number_units(components, reasons, labelled_dims)
    shapes, buffers = weight_shapes(model, state)
    slices = describe_slices(units, labelled_dims)
    layers = describe_layers(units, state, shapes | buffers)
    cost = describe_cost(units, state, slices, shapes, buffers)
    inexact_units, inexact = find_inexact(units, state)
    return ChannelGraph(
        groups=describe_groups(units, slices, cost, state, inexact_units),
        offsets=torch.from_numpy(units.offsets),
        slices=slices,
        layers=layers,
        unprunable=list_unprunable(model, state, components, reasons),
        cost_model=cost,
        traced=traced,
        rewrites=state.rewrites,
        heads=state.heads,
        inexact_units=inexact_units,
        inexact=inexact,
        held_sizes=find_held_sizes(model, labels, units),
        norms=describe_norms(norms, normalised, units),
    )
