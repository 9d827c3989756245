"""Trace a network whose own code must run on fewer channels: it is tried, and channels that it needs stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fastprune.graph import build
from fastprune.graph.channel_graph import ChannelGraph
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.export.nodes import module_of, operator_name
from fastprune.graph.labels.moves import PARTING, SELECTING
from fastprune.graph.model_state import state_of
from fastprune.graph.rewrite import SIZED
from fastprune.surgery.slicing import SurgeryError
from fastprune.surgery.surgery import cut

CUTTING = PARTING | set(SIZED) | SELECTING | {"unbind"}


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
    """Find the channel groups of a network.

    Args:
        model: any ``nn.Module`` that ``torch.export`` takes. It is not changed; its mode does not matter.
        example_inputs: a batch of inputs, a tuple of them, or a dict of them by the names of ``forward``'s arguments;
            [N, C, H, W] for an image network. Costs are counted for this height and width.
        rewrite: whether channels are prunable that the model's own code needs, because it holds their number or cuts
            among them (a channel shuffle, ``split(x, [64, 64])``). If the code cannot run without them, surgery returns
            the rewritten graph of the network, a ``RewrittenNetwork``. False = every compact model has the class of the
            model: its code is tried on fewer channels, in eval mode, and those that it needs stay (without values, on
            the meta device, nothing is tried). Attributes that hold numbers of channels change (``self.c`` in
            ``x.split((self.c, self.c), 1)``), and equal parts lose the same channels.
        ignore: names or patterns (``layer4.*.conv1``) of layers whose output channels stay, or the modules themselves;
            a module, or its name, stands for all layers in it.
        exact: whether a channel is prunable only if its removal equals zeroing it where it is read. False = channels
            are also prunable that operators mix (layer norm, statistics over channels, efficient channel attention,
            weight standardisation); ``graph.inexact`` lists these operators, and surgery measures by how much the
            compact network then differs.
        replace_norms: whether channels are prunable exactly that norms mix (layer norm, RMS norm, group norm of one
            group). Surgery then changes the class of such a norm, so that its statistics count the removed channels as
            zeros; ``graph.norms`` lists them. False = the channels that they read stay.
        heads: whether whole heads of attention are prunable: the rows of a head's queries, keys and values leave with
            the columns that read it, and the number of heads in the model's code changes. False = all heads stay.

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
    graph = build.trace(
        model, example_inputs, rewrite=rewrite, ignore=ignore, exact=exact, replace_norms=replace_norms, heads=heads
    )
    if rewrite or any(tensor.is_meta for tensor in state_of(model).values()):
        return graph
    whole: list[str] = []
    while (failing := failing_modules(graph, model)) is not None:
        wider = next((names for names in widen(failing, model) if not set(names) <= set(whole)), None)
        if wider is None:
            break
        whole += wider
        graph = build.label(
            model,
            graph.traced,
            rewrite=False,
            ignore=ignore,
            exact=exact,
            replace_norms=replace_norms,
            heads=heads,
            whole=whole,
        )
    return graph


def failing_modules(graph: ChannelGraph, model: nn.Module) -> list[str] | None:
    """Return the modules whose code may be what fails on fewer channels; None if the code runs and computes the same.

    Three plans are tried: the first two thirds of each group stay, then twice random channels in random numbers. If
    outputs differ, no module can be named: then all are meant whose code cuts, splits or reshapes.
    """
    generator = torch.Generator().manual_seed(0)
    for trial in range(3 if graph.groups else 0):
        mask = torch.zeros(graph.num_units)
        for group in graph.groups:
            part = 2 / 3 if trial == 0 else float(torch.empty(()).uniform_(0.3, 1.0, generator=generator))
            order = torch.randperm(group.size, generator=generator) if trial else torch.arange(group.size)
            mask[group.units][order[: max(1, int(group.size * part))]] = 1
        if bool(mask.all()):
            continue
        try:
            cut(graph.plan(mask), model, graph.traced)
        except SurgeryError as error:
            if error.module is not None:
                return [error.module]
            nodes = [node for node in graph.traced.evaluation.graph.nodes if operator_name(node) in CUTTING]
            return list(dict.fromkeys(map(module_of, nodes)))
    return None


def widen(failing: list[str], model: nn.Module) -> Iterator[list[str]]:
    """Yield the modules that may need all their channels, from few to many; ``name.*`` stands for all inside.

    First all modules of the failing one's class, but of torch's own layers the failing one alone; then also the modules
    inside them; then the same for the parent.

    Args:
        failing: names of modules.
        model: the network.
    """
    if len(failing) != 1:
        yield failing
        return
    parts = failing[0].split(".") if failing[0] else []
    for depth in range(len(parts), -1, -1):
        kind = type(model.get_submodule(".".join(parts[:depth])))
        if kind.__module__.startswith("torch.") and depth:  # a layer is not to blame for others of its kind
            if depth == len(parts):
                yield failing
            continue
        alike = [name for name, module in model.named_modules() if type(module) is kind]
        yield alike
        yield [f"{name}.*" if name else "*" for name in alike]
