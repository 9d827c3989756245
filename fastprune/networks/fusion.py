"""Convolution, batch norm, sum and activation of a traced graph as one call, for networks whose weights do not change.

A gate in front of a convolution goes into the convolution's weight, and the derivative of an activation whose readers
are all such calls into their backward pass: see :class:`fastprune.ops.conv.deferred.Deferred`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastprune.graph.export.regions import MODES
from fastprune.ops.arguments import FLOATS, vector_dtype
from fastprune.ops.conv.deferred import Deferred
from fastprune.ops.conv.frozen import FrozenConv

aten = torch.ops.aten

ACTIVATION_OF: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
}
BOUNDED = (aten.hardtanh.default, aten.clamp.default)  # relu6 where the bounds are 0 and 6


@dataclass
class Chain:
    """A convolution and what follows it and nothing else reads.

    Args:
        conv: the convolution; it reads ``conv.args[0]``.
        end: the node whose value the chain computes.
        norm: the batch norm, if there is one.
        residual: what is added before the activation, if anything is.
        activation: by its name in the kernels.
    """

    conv: Node
    end: Node
    norm: Node | None = None
    residual: Node | None = None
    activation: str = "identity"


class FusedConv(nn.Module):
    """What computes a chain. It holds no parameters: they are arguments, as they are of the operators it replaces.

    Args:
        moves: stride, padding, dilation and groups of the convolution.
        activation: by its name in the kernels.
        eps: that of the batch norm.

    Attributes:
        defers: every reader is another of these, which computes the activation's gradient.
        branches: the result is a pair; other readers of ``x`` read its second instead.
    """

    def __init__(self, moves: Mapping[str, Any], activation: str, eps: float) -> None:
        super().__init__()
        self.moves, self.activation, self.eps = dict(moves), activation, eps
        self.defers = self.branches = False
        self._made: tuple[Any, FrozenConv] | None = None

    def forward(
        self, x: Tensor | Deferred, gates: Tensor | None, residual: Tensor | None, weight: Tensor, *rest: Tensor | None
    ) -> Any:
        """The chain's value; ``rest`` is the bias, and weight, bias, running mean and variance of the batch norm."""
        source = x._r if isinstance(x, Deferred) else x
        dtype = source.dtype
        if torch.is_autocast_enabled(source.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(source.device.type)
        conv = self.frozen(dtype, weight, *rest)
        if isinstance(x, Tensor) or source.dtype != dtype:
            x = x.settled() if isinstance(x, Deferred) else x
            x = x.to(dtype, memory_format=torch.channels_last)
        if gates is not None:
            x = gated(x, gates.to(vector_dtype(source)))
        residual = residual if residual is None else residual.to(dtype)
        if self.branches:
            deferred, handed_on = conv.branch(x)
            return deferred if self.defers else deferred.settled(), handed_on
        return conv.defer(x, residual=residual) if self.defers else conv(x, residual=residual)

    def frozen(self, dtype: torch.dtype, *tensors: Tensor | None) -> FrozenConv:
        """The convolution, made again if a tensor has been changed, replaced or moved since."""
        made_from = (dtype, *(None if t is None else version(t) for t in tensors))
        if self._made is None or self._made[0] != made_from:
            weight, bias, gamma, beta, mean, variance = tensors
            assert weight is not None
            bn = None if mean is None or variance is None else (gamma, beta, mean, variance)
            conv = FrozenConv(
                weight, bn, bias=bias, **self.moves, activation=self.activation, eps=self.eps, dtype=dtype
            )
            self._made = made_from, conv
        return self._made[1]


def version(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor is written into, replaced or moved."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.device


def gated(x: Tensor | Deferred, gates: Tensor) -> Deferred:
    """``gates * x``, for the convolution that reads it to multiply."""
    if isinstance(x, Deferred):
        return replace(x, mask=gates)
    return Deferred(x, gates, "identity", x.shape[1], x.shape[1], False)


def find_chains(module: GraphModule) -> list[Chain]:
    """The convolutions that a :class:`FusedConv` can compute, with what follows each of them.

    Those whose weights are computed, with other than two spatial dimensions, or in other than the usual types are left.
    """
    region, regions = 0, {}
    for node in module.graph.nodes:
        region += node.target in MODES
        regions[node] = region
    chains = []
    taken: set[Node] = set()
    for node in module.graph.nodes:
        if not is_conv(node):
            continue
        chain = Chain(node, node)
        while len(chain.end.users) == 1:
            (following,) = chain.end.users
            if following in taken or regions[following] != regions[node] or not extends(chain, following):
                break
            taken.add(following)
        chains.append(chain)
    return chains


def is_conv(node: Node) -> bool:
    """Whether a node is a two-dimensional convolution with parameters that are tensors of the module."""
    if node.target is not aten.conv2d.default:
        return False
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    return (
        is_stored(weight)
        and (bias is None or is_stored(bias))
        and value_of(node).dim() == 4  # not a single image
        and value_of(weight).dtype in FLOATS
        and value_of(weight).dtype == value_of(cast("Node", node.args[0])).dtype
    )


def extends(chain: Chain, node: Node) -> bool:
    """Take one more node into a chain if it may follow there."""
    plain = chain.activation == "identity"
    if node.target is aten.batch_norm.default and chain.norm is None and chain.residual is None and plain:
        statistics = [argument(node, place, name) for place, name in ((3, "running_mean"), (4, "running_var"))]
        affine = [argument(node, place, name) for place, name in ((1, "weight"), (2, "bias"))]
        if argument(node, 5, "training") or not all(map(is_stored, statistics)):
            return False
        if any(tensor is not None and not is_stored(tensor) for tensor in affine):
            return False
        chain.norm = node
    elif node.target is aten.add.Tensor and chain.residual is None and plain:
        a, b = node.args[:2]
        other = b if a is chain.end else a
        if node.kwargs or not isinstance(other, Node) or other is chain.end:
            return False
        if not same_kind(value_of(other), value_of(chain.end)):
            return False
        chain.residual = other
    elif plain and (activation := activation_of(node)):
        chain.activation = activation
    else:
        return False
    chain.end = node
    return True


def activation_of(node: Node) -> str | None:
    """The name of the activation that a node computes, if the kernels have it."""
    if node.target in BOUNDED:
        lowest, highest = argument(node, 1, "min_val"), argument(node, 2, "max_val")
        return "relu6" if (lowest, highest) == (0, 6) else None
    return ACTIVATION_OF.get(node.target)


def fuse(module: GraphModule, chains: list[Chain], gates: Mapping[Node, Node]) -> None:
    """Replace chains by calls of :class:`FusedConv`.

    Args:
        module: whose graph is changed; nothing in it may write into what another node reads.
        chains: of ``find_chains``.
        gates: {a chain's convolution: the gates of the channels that it reads}.
    """
    for number, chain in enumerate(chains):
        name = f"_fused_{number}"
        module.add_submodule(name, made_of(chain))
        norm = [None] * 4 if chain.norm is None else [argument(chain.norm, n, key) for n, key in enumerate(NORM, 1)]
        tensors = [argument(chain.conv, 1, "weight"), argument(chain.conv, 2, "bias"), *norm]
        with module.graph.inserting_before(chain.end):
            call = module.graph.call_module(name, (chain.conv.args[0], gates.get(chain.conv), chain.residual, *tensors))
        call.meta = dict(chain.end.meta)
        chain.end.replace_all_uses_with(call)
        for other in chains:
            other.residual = call if other.residual is chain.end else other.residual
    module.graph.eliminate_dead_code()
    for source in module.graph.nodes:  # also those that it inserts further on
        if source.op not in ("get_attr", "output"):
            share(module, source)


def made_of(chain: Chain) -> FusedConv:
    """The module that computes a chain."""
    names = ("stride", "padding", "dilation", "groups")
    given = {name: argument(chain.conv, place, name) for place, name in enumerate(names, 3)}
    moves = {name: value for name, value in given.items() if value is not None}
    eps = 0.0 if chain.norm is None else argument(chain.norm, 7, "eps")
    return FusedConv(moves, chain.activation, eps)


def share(module: GraphModule, source: Node) -> None:
    """Decide who computes the gradient of an activation, and who adds the gradients of those who read it.

    A chain leaves its activation's gradient to its readers if those are chains. Where a value has several readers, and
    the first is a chain without gates, that one hands the value on to the others and adds their gradients to its own.
    """
    readers = sorted(source.users)
    if not readers:
        return
    first = readers[0]
    hands_on = len(readers) > 1 and reads(module, first, source) and first.args[1] is None and first.args[2] is None
    maker = fused_at(module, source.args[0] if source.target is operator.getitem else source)
    if maker is not None and not (source.op == "call_module" and maker.branches) and is_result(source):
        maker.defers = hands_on or all(reads(module, reader, source) for reader in readers)
    if hands_on:
        reader_module = fused_at(module, first)
        assert reader_module is not None
        reader_module.branches = True
        with module.graph.inserting_after(first):
            handed_on = module.graph.call_function(operator.getitem, (first, 1))
            result = module.graph.call_function(operator.getitem, (first, 0))
        first.replace_all_uses_with(result, delete_user_cb=lambda user: user not in (handed_on, result))
        for reader in readers[1:]:
            reader.replace_input_with(source, handed_on)


def is_result(node: Node) -> bool:
    """Whether a node is what a chain computes, rather than what it hands on."""
    return node.op == "call_module" or node.args[1:] == (0,)


def reads(module: GraphModule, reader: Node, source: Node) -> bool:
    """Whether a node is a chain whose convolution, and nothing else of it, reads ``source``."""
    if fused_at(module, reader) is None:
        return False
    x, _, residual, *_ = reader.args
    return x is source and residual is not source


def fused_at(module: GraphModule, node: Any) -> FusedConv | None:
    """The module that a node calls, if it is a chain."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    called = module.get_submodule(str(node.target))
    return called if isinstance(called, FusedConv) else None


def argument(node: Node, place: int, name: str) -> Any:
    """An argument of an operator's node, or its default."""
    if place < len(node.args):
        return node.args[place]
    schema = cast("torch._ops.OpOverload", node.target)._schema
    return node.kwargs.get(name, schema.arguments[place].default_value)


def is_stored(node: Any) -> bool:
    """Whether a node is a parameter or a buffer."""
    return isinstance(node, Node) and node.op == "get_attr"


def value_of(node: Node) -> Tensor:
    """The tensor that the exporter saw at a node."""
    value: Tensor = node.meta["val"]
    return value


def same_kind(a: Tensor, b: Tensor) -> bool:
    """Whether two values have one shape and dtype, whatever the batch."""
    return a.dtype == b.dtype and [*map(str, a.shape)] == [*map(str, b.shape)]


NORM = ("weight", "bias", "running_mean", "running_var")
