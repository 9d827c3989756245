"""Trace a network: its graphs, the labels that flow through them, and the ``ChannelGraph`` that is built of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from fastprune.graph.channel_graph import ChannelGraph
from fastprune.graph.description import describe_cost, describe_groups, describe_layers, describe_slices, weight_shapes
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.export.tracing import Traced, trace_graphs
from fastprune.graph.labels.interpret import run_on_labels
from fastprune.graph.labels.propagate import Propagation
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
) -> ChannelGraph:
    """Find the channel groups of a network.

    Args:
        model: any ``nn.Module`` that ``torch.export`` takes. It is not changed; its mode does not matter.
        example_inputs: a batch of inputs, a tuple of them, or a dict of them by the names of ``forward``'s arguments;
            [N, C, H, W] for an image network. Costs are counted for this height and width.
        rewrite: whether channels are prunable that the model's own code needs, because it holds their number or cuts
            among them (a channel shuffle, ``split(x, [64, 64])``). If the code cannot run without them, surgery returns
            the rewritten graph of the network, a ``RewrittenNetwork``. False = these channels stay, and every compact
            model has the class of the model.
        ignore: names or patterns (``layer4.*.conv1``) of layers whose output channels stay, or the modules themselves;
            a module, or its name, stands for all layers in it.
        exact: whether a channel is prunable only if its removal equals zeroing it where it is read. False = channels
            are also prunable that operators mix (layer norm, statistics over channels, efficient channel attention,
            weight standardisation); ``graph.inexact`` lists these operators, and surgery measures by how much the
            compact network then differs.

    Returns:
        The ``ChannelGraph``.

    Raises:
        TraceError: if the model cannot be exported; names the reason.
        TypeError: if the inputs are no tensors, or what is to be ignored is no name and no module.
        ValueError: if a name or pattern to ignore fits no layer, or a module to ignore is none of the model's.

    Example:
        >>> import torch, fastprune as fp
        >>> graph = fp.trace(fp.models.create("resnet20"), torch.zeros(1, 3, 32, 32))
        >>> len(graph.groups), graph.num_units, round(float(graph.cost().macs) / 1e6, 2)
        (10, 352, 40.55)
    """
    patterns = layer_names(model, ignore)
    traced = trace_graphs(model, example_inputs)
    state = Propagation(exact=exact, rewrites=rewrite)
    run_on_labels(traced.evaluation, traced.inputs, state, record=True)
    if traced.training is not None:
        run_on_labels(traced.training, traced.inputs, state, record=False)
    for pattern in patterns:
        keep_outputs(state, pattern)
    return build(model, traced, state)


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


def build(model: nn.Module, traced: Traced, state: Propagation) -> ChannelGraph:
    """Number the units, gather them into groups and describe both."""
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
        inexact_units=inexact_units,
        inexact=inexact,
    )
