"""Folding of the constants of closed channels into the next layers.

A channel whose batch norm has γ = 0 and β ≠ 0 is the constant act(β) for all its readers. Closing it changes nothing if
the readers' shifts absorb the constant (Khetan and Karnin, 2020, §4.2). This is exact where every output pixel sees the
constant under all weights of the kernel, as under a 1 × 1 kernel. With zero padding it is exact inside and inexact at
the rim.
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
from fastprune.methods.gcp.closable import probe_inputs
from fastprune.networks.chains import is_stored

aten = torch.ops.aten
EVEN = 1e-5  # variation of a constant channel by rounding, relative to its largest value


class _Readings(Interpreter):
    """An execution of a network that records the constant inputs of some layers."""

    def __init__(self, network: GraphModule, layers: dict[str, Layer], closing: Tensor) -> None:
        super().__init__(network)
        self.layers, self.closing = layers, closing
        self.constants: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Execute a node; record which closing channels of a layer's input are constant, and their values."""
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
    """Move the contribution of constant channels into the shifts behind the layers that read them.

    The shift is the running mean of the batch norm that alone reads the layer, otherwise the layer's bias.

    Args:
        graph: the channels of ``model``.
        model: the model; its biases and running means change, the channels themselves do not.
        network: the traced network in eval mode with the model's tensors, whose last input are gates
            (``MaskedNetwork.network``).
        closing: the units that will be closed, bool [U]; those that are not constant are ignored.

    Returns:
        The fraction of the layers reading constants that have such a shift.
    """
    closing = closing.cpu()
    layers = {layer.node: layer for layer in graph.layers if reads_any(layer, closing)}
    inputs = probe_inputs(graph, next(model.parameters()).device)
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
        contribution = sum_constants(weight.double().cpu(), constants, layers[node.name], count_groups(node))
        shift = find_shift(node)
        if contribution is None or shift is None:
            continue
        name, sign = shift
        tensors[name].add_((sign * contribution).to(tensors[name]))
        placed += 1
    return placed / found if found else 1.0


def reads_any(layer: Layer, units: Tensor) -> bool:
    """Return whether a layer reads one of ``units`` and is not depthwise."""
    return not layer.depthwise and bool(belong_to(layer.in_units, units).any())


def count_groups(node: Node) -> int:
    """Return the number of groups of a convolution, 1 for other layers."""
    target = node.target
    return int(argument_of(node, "groups")) if target in (aten.conv1d.default, aten.conv2d.default) else 1


def sum_constants(weight: Tensor, constants: Tensor, layer: Layer, groups: int) -> Tensor | None:
    """Sum up what constants [channels in] add to each output channel inside the rim; None for other kinds of layers."""
    if layer.kind not in ("conv1d", "conv2d", "linear") or weight.dim() < 2:
        return None
    kernel = weight.flatten(2).sum(2) if weight.dim() > 2 else weight  # [out, in / groups]
    parts = constants.view(groups, -1).repeat_interleave(
        kernel.shape[0] // groups, 0
    )  # the constants that each output reads
    return (kernel * parts).sum(1)


def find_shift(node: Node) -> tuple[str, float] | None:
    """Find the tensor that shifts a layer's output; return its name and the sign of a constant in it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.batch_norm.default:
        mean = argument_of(users[0], "running_mean")
        if is_stored(mean):
            return str(mean.target), -1.0
    bias = argument_of(node, "bias")
    return (str(bias.target), 1.0) if is_stored(bias) else None
