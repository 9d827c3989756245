"""Convolution, batch norm, sum and activation of a traced graph as one call, for networks whose weights do not change.

A gate in front of a convolution is multiplied into the convolution's weight. The derivative of an activation whose
readers are all such calls is left to their backward pass: see :class:`fastprune.ops.conv.deferred.Deferred`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastprune.graph.export.nodes import argument_of
from fastprune.networks.chains import Chain, is_stored
from fastprune.networks.traced_copy import replace_by_module, version
from fastprune.ops.arguments import FLOATS, vector_dtype
from fastprune.ops.conv.deferred import Deferred
from fastprune.ops.conv.frozen import FrozenConv

aten = torch.ops.aten

NORM = ("weight", "bias", "running_mean", "running_var")


class FusedConv(nn.Module):
    """A chain that begins with a convolution, as one call.

    It holds no parameters: they are arguments, as they are of the operators that it replaces.

    Args:
        geometry: stride, padding, dilation and groups of the convolution.
        activation: its name in the kernels.
        eps: that of the batch norm.

    Attributes:
        defers: every reader is another of these, which computes the activation's gradient.
        branches: the result is a pair; other readers of ``x`` read its second value instead.
    """

    def __init__(self, geometry: Mapping[str, Any], activation: str, eps: float) -> None:
        super().__init__()
        self.geometry, self.activation, self.eps = dict(geometry), activation, eps
        self.defers = self.branches = False
        self._frozen: tuple[Any, FrozenConv] | None = None

    def forward(
        self, x: Tensor | Deferred, gates: Tensor | None, residual: Tensor | None, weight: Tensor, *rest: Tensor | None
    ) -> Any:
        """Return the chain's value; ``rest`` is the bias, and weight, bias, mean and variance of the batch norm."""
        source = x._r if isinstance(x, Deferred) else x
        dtype = source.dtype
        if torch.is_autocast_enabled(source.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(source.device.type)
        conv = self.freeze(dtype, weight, *rest)
        if isinstance(x, Tensor) or source.dtype != dtype:
            x = x.settled() if isinstance(x, Deferred) else x
            x = x.to(dtype, memory_format=torch.channels_last)
        if gates is not None:
            x = defer_gates(x, gates.to(vector_dtype(source)))
        residual = residual if residual is None else residual.to(dtype)
        if self.branches:
            deferred, handed_on = conv.branch(x)
            return deferred if self.defers else deferred.settled(), handed_on
        return conv.defer(x, residual=residual) if self.defers else conv(x, residual=residual)

    def freeze(self, dtype: torch.dtype, *tensors: Tensor | None) -> FrozenConv:
        """Return the frozen convolution; it is made anew after a tensor was changed, replaced or moved."""
        versions = (dtype, *(None if t is None else version(t) for t in tensors))
        if self._frozen is None or self._frozen[0] != versions:
            weight, bias, gamma, beta, mean, variance = tensors
            assert weight is not None
            bn = None if mean is None or variance is None else (gamma, beta, mean, variance)
            conv = FrozenConv(
                weight, bn, bias=bias, **self.geometry, activation=self.activation, eps=self.eps, dtype=dtype
            )
            self._frozen = versions, conv
        return self._frozen[1]


def frozen_convolutions(module: GraphModule) -> list[FrozenConv]:
    """Return the convolutions of a graph that are folded now."""
    calls = (call for call in module.modules() if isinstance(call, FusedConv))
    return [call._frozen[1] for call in calls if call._frozen is not None]


def defer_gates(x: Tensor | Deferred, gates: Tensor) -> Deferred:
    """Return ``gates * x``, which the convolution that reads it multiplies."""
    if isinstance(x, Deferred):
        return replace(x, mask=gates)
    return Deferred(x, gates, "identity", x.shape[1], x.shape[1], False)


def is_fusable(node: Node) -> bool:
    """Return whether a :class:`FusedConv` can compute a node: a convolution of images by stored tensors.

    Weights that are computed, other than two spatial dimensions, and unusual types are left to torch.
    """
    if node.target is not aten.conv2d.default:
        return False
    weight, bias = argument_of(node, "weight"), argument_of(node, "bias")
    if not (is_stored(weight) and (bias is None or is_stored(bias))):
        return False
    x, w, y = (seen.meta["val"] for seen in (argument_of(node, "input"), weight, node))
    return y.dim() == 4 and w.dtype in FLOATS and w.dtype == x.dtype  # 3 dimensions: a single image


def fuse(module: GraphModule, chains: list[Chain], gates: Mapping[Node, Node | None]) -> None:
    """Replace chains by calls of :class:`FusedConv`.

    Args:
        module: its graph is changed; nothing in it may write into what another node reads.
        chains: those that begin with an ``is_fusable`` node.
        gates: {a chain's convolution: the gates of the channels that it reads, if they have any}.
    """
    for number, chain in enumerate(chains):
        norm = [None] * 4 if chain.norm is None else [argument_of(chain.norm, name) for name in NORM]
        tensors = [argument_of(chain.first, name) for name in ("weight", "bias")]
        reads = (argument_of(chain.first, "input"), gates.get(chain.first), chain.residual, *tensors, *norm)
        replace_by_module(module, chain.end, f"_fused_{number}", build_fused_conv(chain), reads)
    module.graph.eliminate_dead_code()
    for source in module.graph.nodes:  # the nodes that it inserts further on, too
        if source.op not in ("get_attr", "output"):
            assign_gradients(module, source)


def build_fused_conv(chain: Chain) -> FusedConv:
    """Build the module that computes a chain."""
    geometry = {name: argument_of(chain.first, name) for name in ("stride", "padding", "dilation", "groups")}
    eps = 0.0 if chain.norm is None else argument_of(chain.norm, "eps")
    return FusedConv(geometry, chain.activation, eps)


def assign_gradients(module: GraphModule, source: Node) -> None:
    """Decide who computes the gradient of an activation, and who adds the gradients of those who read it.

    A chain leaves its activation's gradient to its readers if those are chains. Where a value has several readers, and
    the first is a chain without gates, that one hands the value on to the others and adds their gradients to its own.
    """
    readers = sorted(source.users)
    if not readers:
        return
    first = readers[0]
    hands_on = len(readers) > 1 and convolves(module, first, source) and first.args[1] is None and first.args[2] is None
    maker = fused_conv_at(module, source.args[0] if source.target is operator.getitem else source)
    if maker is not None and not (source.op == "call_module" and maker.branches) and is_result(source):
        maker.defers = hands_on or all(convolves(module, reader, source) for reader in readers)
    if hands_on:
        reader_module = fused_conv_at(module, first)
        assert reader_module is not None
        reader_module.branches = True
        with module.graph.inserting_after(first):
            handed_on = module.graph.call_function(operator.getitem, (first, 1))
            result = module.graph.call_function(operator.getitem, (first, 0))
        first.replace_all_uses_with(result, delete_user_cb=lambda user: user not in (handed_on, result))
        for reader in readers[1:]:
            reader.replace_input_with(source, handed_on)


def is_result(node: Node) -> bool:
    """Return whether a node is what a chain computes, rather than what it hands on."""
    return node.op == "call_module" or node.args[1:] == (0,)


def convolves(module: GraphModule, reader: Node, source: Node) -> bool:
    """Return whether a node is a chain whose convolution, and nothing else of it, reads ``source``."""
    if fused_conv_at(module, reader) is None:
        return False
    x, _, residual, *_ = reader.args
    return x is source and residual is not source


def fused_conv_at(module: GraphModule, node: Any) -> FusedConv | None:
    """Return the module that a node calls, if it is a chain."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    called = module.get_submodule(str(node.target))
    return called if isinstance(called, FusedConv) else None
