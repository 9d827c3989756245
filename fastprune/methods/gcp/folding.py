"""Constants that closed channels leave behind, folded into what follows.

A channel whose batch norm has γ = 0 and β ≠ 0 is the constant act(β) for everything that reads it. It can be closed
without a trace where the readers' shift takes the constant over (Khetan and Karnin, 2020, §4.2). Exact where every
output pixel sees the constant under all weights of the kernel, as under a 1 × 1 kernel; with zero padding it is exact
inside, and not at the rim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fastprune.graph import ChannelGraph, Layer
from fastprune.graph.export.nodes import argument_of
from fastprune.graph.export.regions import restore_modes
from fastprune.graph.structure import belong_to
from fastprune.networks.chains import is_stored

aten = torch.ops.aten
EVEN = 1e-5  # of the largest value: how far a constant channel may vary by rounding


class _Readings(Interpreter):
    """Executes a network and keeps what some layers read."""

    def __init__(self, network: GraphModule, layers: dict[str, Layer], closing: Tensor) -> None:
        super().__init__(network)
        self.layers, self.closing = layers, closing
        self.constants: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value; of a layer's input the constant channels that are to close are kept."""
        if n.name in self.layers:
            layer = self.layers[n.name]
            x = self.fetch_args_kwargs_from_env(n)[0][0].detach().movedim(layer.channel_dim, 0).flatten(1).double()
            low, high = x.amin(1).cpu(), x.amax(1).cpu()
            even = high - low <= EVEN * high.abs().maximum(low.abs())
            closes = belong_to(layer.in_units, self.closing)
            self.constants[n.name] = torch.where(closes & even, (low + high) / 2, 0.0)
        return super().run_node(n)


@torch.no_grad()
def fold_constants(graph: ChannelGraph, model: nn.Module, network: GraphModule, closing: Tensor) -> float:
    """Move what constant channels contribute into the shifts behind the layers that read them.

    Out of the running mean of the batch norm that follows alone, else into the layer's bias.

    Args:
        graph: the channels of ``model``.
        model: its biases and running means are changed; the channels themselves are not.
        network: the traced network in eval mode with the model's tensors and gates as its last input
            (``MaskedNetwork.network``).
        closing: the units that will be closed, bool [U]. Those that are no constant are left alone.

    Returns:
        The part of the constants that found a place, by number.
    """
    closing = closing.cpu()
    layers = {layer.node: layer for layer in graph.layers if reads_any(layer, closing)}
    inputs = probes(graph, next(model.parameters()).device)
    readings = _Readings(network, layers, closing)
    with restore_modes():
        readings.run(*inputs, torch.ones(graph.num_units, device=inputs[0].device))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    found = placed = 0
    for node in network.graph.nodes:
        constants = readings.constants.get(node.name)
        if constants is None or not bool(constants.any()):
            continue
        found += 1
        weight = tensors[layers[node.name].weight]
        contribution = contribution_of(weight.double().cpu(), constants, layers[node.name], argument_or_none(node))
        shift = shift_behind(node)
        if contribution is None or shift is None:
            continue
        name, sign = shift
        tensors[name].add_((sign * contribution).to(tensors[name]))
        placed += 1
    return placed / found if found else 1.0


def reads_any(layer: Layer, units: Tensor) -> bool:
    """Whether a layer, other than a depthwise one, reads one of ``units``."""
    return not layer.depthwise and bool(belong_to(layer.in_units, units).any())


def argument_or_none(node: Node) -> int:
    """The number of groups of a convolution, 1 for other layers."""
    target = node.target
    return int(argument_of(node, "groups")) if target in (aten.conv1d.default, aten.conv2d.default) else 1


def contribution_of(weight: Tensor, constants: Tensor, layer: Layer, groups: int) -> Tensor | None:
    """What constants [channels in] add to each output channel, away from the rim; None for kinds without a rule."""
    if layer.kind not in ("conv1d", "conv2d", "linear") or weight.dim() < 2:
        return None
    kernel = weight.flatten(2).sum(2) if weight.dim() > 2 else weight  # [out, in / groups]
    parts = constants.view(groups, -1).repeat_interleave(kernel.shape[0] // groups, 0)  # those that each output reads
    return (kernel * parts).sum(1)


def shift_behind(node: Node) -> tuple[str, float] | None:
    """The name of what shifts a layer's output, and the sign with which a constant goes into it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.batch_norm.default:
        mean = argument_of(users[0], "running_mean")
        if is_stored(mean):
            return str(mean.target), -1.0
    bias = argument_of(node, "bias")
    return (str(bias.target), 1.0) if is_stored(bias) else None


def probes(graph: ChannelGraph, device: torch.device) -> list[Tensor]:
    """Inputs like the example's, but random where they are numbers: zeros, or the same image twice, would show less."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(x.shape, generator=generator).to(x.dtype) if x.is_floating_point() else x).to(device)
        for x in graph.traced.inputs.tensors
    ]
