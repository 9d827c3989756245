"""Trace a network whose own code must run on fewer channels: it is tried, and channels that it needs stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fastprune.graph import build
from fastprune.graph.channel_graph import ChannelGraph
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.export.nodes import operator_name
from fastprune.graph.export.tracing import Traced
from fastprune.graph.held_sizes import SIZED
from fastprune.graph.labels.moves import PARTING, SELECTING
from fastprune.graph.model_state import state_of
from fastprune.surgery.slicing import SurgeryError, slice_model
from fastprune.surgery.verification import verify

CUTTING = PARTING | SIZED | SELECTING | {"unbind", "layer_norm", "group_norm", "rms_norm"}


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
            the rewritten graph of the network, a ``RewrittenNetwork``. False = every compact model has the class of the
            model: its code is tried on fewer channels, and those that it needs stay. Attributes that hold numbers of
            channels change (``self.c`` in ``x.split((self.c, self.c), 1)``), and equal parts lose the same channels.
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
    graph = build.trace(model, example_inputs, rewrite=rewrite, ignore=ignore, exact=exact)
    if rewrite or not cuts(graph.traced) or any(tensor.is_meta for tensor in state_of(model).values()):
        return graph
    still: list[str] = []
    while (failing := failing_module(graph, model)) is not None:
        wider = next((names for names in widen(failing, model) if not set(names) <= set(still)), None)
        if wider is None:
            break
        still += wider
        graph = build.label(model, graph.traced, rewrite=False, ignore=ignore, exact=exact, still=still)
    return graph


def cuts(traced: Traced) -> bool:
    """Return whether any operator may hold a number of channels, or cut at one; other code runs on any number."""
    graphs = [traced.evaluation] if traced.training is None else [traced.evaluation, traced.training]
    return any(operator_name(node) in CUTTING for graph in graphs for node in graph.graph.nodes)


def failing_module(graph: ChannelGraph, model: nn.Module) -> str | None:
    """Return the module whose code fails where every group has lost channels; None if none does."""
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[group.units][max(1, group.size * 2 // 3) :] = 0
    plan = graph.plan(mask)
    try:
        verify(plan, model, slice_model(plan, model))
    except SurgeryError as error:
        return error.module
    return None


def widen(failing: str, model: nn.Module) -> Iterator[list[str]]:
    """Yield the modules that may need all their channels if the code of one fails, from few to many.

    The first are those of the same class, then they with all modules inside, then the same of the module around.

    Args:
        failing: the module's name.
        model: the network.
    """
    parts = failing.split(".") if failing else []
    for depth in range(len(parts), -1, -1):
        kind = type(model.get_submodule(".".join(parts[:depth])))
        alike = [name for name, module in model.named_modules() if type(module) is kind]
        yield alike
        yield [f"{name}.*" if name else "*" for name in alike]
