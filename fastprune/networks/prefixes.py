"""Sub-networks of a network whose weights do not change: on the CPU by our own kernels.

The first rows and columns of a weight lie in the packed weight where the kernels read them. So each weight is packed
once for all widths, or twice, as few channels take another algorithm. Batch statistics, batch norm and activation are
two passes over the result of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastprune.graph.export.nodes import argument_of
from fastprune.graph.model_state import attribute_of
from fastprune.graph.rewrite import RewrittenGraph
from fastprune.networks.chains import Chain, find_chains
from fastprune.networks.traced_copy import let_views_copy, replace_by_module, version
from fastprune.ops.conv.library import IN_PLACE, Geometry
from fastprune.ops.conv.packed import PackedWeight, algorithm_for, convolve_prefix, pack, takes
from fastprune.ops.masked_bn_act import batch_norm_in_place, masked_bn_act

aten = torch.ops.aten


class PrefixConv(nn.Module):
    """A convolution with the first rows and columns of a weight, without gradients.

    Args:
        full: returns the whole weight.
        geometry: stride, padding and dilation.
    """

    def __init__(self, full: Callable[[], Tensor], geometry: Mapping[str, Any]) -> None:
        super().__init__()
        self.full, self.geometry = full, dict(geometry)
        self._packed: dict[str, tuple[Any, PackedWeight]] = {}  # by algorithm

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Convolve x [N, c, H, W] with ``weight`` [k, c / groups, R, S], mostly a view of the whole one."""
        geometry = Geometry(**self.geometry, groups=groups)
        if not (x.dim() == 4 and runs_here(x) and takes(x, weight, geometry)):
            return F.conv2d(x, weight, bias, **self.geometry, groups=groups)
        algorithm = algorithm_for(weight, geometry, x.shape[1])
        return convolve_prefix(x, self.pack(weight, geometry, algorithm), weight.shape[0], bias)

    def pack(self, weight: Tensor, geometry: Geometry, algorithm: str) -> PackedWeight:
        """Return the whole weight, packed once for each algorithm; a part that is no prefix of it is packed alone."""
        full = self.full()
        grouped = geometry.groups > 1 and full.shape[1] > 1  # depthwise in this sub-network alone
        if not is_prefix(weight, full) or grouped or full.is_inference():  # inference tensors count no versions
            return pack(weight, geometry)
        if algorithm not in self._packed or self._packed[algorithm][0] != version(full):
            self._packed = {a: packed for a, packed in self._packed.items() if packed[0] == version(full)}
            whole = replace(geometry, groups=1 if geometry.groups == 1 else full.shape[0])
            self._packed[algorithm] = version(full), pack(full.detach(), whole, algorithm=algorithm)
        return self._packed[algorithm][1]


class NormAct(nn.Module):
    """Batch norm with the statistics of the batch, a sum, and the activation behind it, without gradients.

    Args:
        eps: added to the variance.
        activation: its name in the kernels.
        otherwise: the activation, where the kernels do not take the input.
        overwrites: whether nothing else reads x, which is then overwritten: new memory costs more than the arithmetic.
    """

    def __init__(self, eps: float, activation: str, otherwise: Callable[[Tensor], Tensor], *, overwrites: bool) -> None:
        super().__init__()
        self.eps, self.activation, self.otherwise, self.overwrites = eps, activation, otherwise, overwrites

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """Return ``act(bn(x) + residual)`` of x [N, C, ...]."""
        if not runs_here(x) or x.numel() <= x.shape[1]:  # torch's function returns the bias for a single value
            y = torch.batch_norm(x, weight, bias, None, None, True, 0.1, self.eps, torch.backends.cudnn.enabled)
            return self.otherwise(y if residual is None else y + residual)
        activation = self.activation if residual is None else "identity"
        if self.overwrites:
            y = batch_norm_in_place(x, weight, bias, activation=activation, eps=self.eps)
        else:
            y = masked_bn_act(x, (weight, bias, None, None), activation=activation, eps=self.eps, training=True)
        return y if residual is None else IN_PLACE[self.activation](y.add_(residual))


def runs_here(x: Tensor) -> bool:
    """Return whether the kernels compute a tensor without gradients as the library would."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and not torch.is_grad_enabled()


def is_prefix(part: Tensor, full: Tensor) -> bool:
    """Return whether a tensor is a view of the first rows and columns of another."""
    return part.data_ptr() == full.data_ptr() and part.stride() == full.stride() and part.dim() == 4


def use_kernels(rewritten: RewrittenGraph, source: GraphModule, convs: dict[Any, nn.Module]) -> None:
    """Replace the convolutions and batch norms of a rewritten graph, which is changed.

    Args:
        rewritten: the graph; nothing in it writes into a tensor.
        source: holds the whole tensors that the graph takes slices of, by the same names.
        convs: convolutions by their weight, for later graphs to use again.
    """
    module, count = rewritten.module, len(rewritten.tensors) + len(rewritten.indices)
    inputs = module.graph.find_nodes(op="placeholder")
    weights = dict(zip(inputs[len(inputs) - count :], rewritten.tensors, strict=False))
    chains = find_chains(module, uses_batch_statistics)
    for node in module.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        if argument_of(node, "weight") in weights:
            name = weights[argument_of(node, "weight")]
            replace_conv(module, node, name, partial(attribute_of, source, name), convs)
    for chain in chains:
        replace_norm(module, chain)
    let_views_copy(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def uses_batch_statistics(node: Node) -> bool:
    """Return whether a node is a batch norm as in training."""
    return node.target is aten.batch_norm.default and bool(argument_of(node, "training"))


def replace_conv(
    module: GraphModule, node: Node, weight: str, full: Callable[[], Tensor], convs: dict[Any, nn.Module]
) -> None:
    """Let a :class:`PrefixConv` compute a node."""
    given = {name: tuple(argument_of(node, name)) for name in ("stride", "padding", "dilation")}
    geometry = {name: numbers * 2 if len(numbers) == 1 else numbers for name, numbers in given.items()}
    conv = convs.setdefault((weight, *geometry.values()), PrefixConv(full, geometry))
    reads = tuple(argument_of(node, name) for name in ("input", "weight", "bias", "groups"))
    replace_by_module(module, node, f"conv_of_{node.name}", conv, reads)


def replace_norm(module: GraphModule, chain: Chain) -> None:
    """Let a :class:`NormAct` compute a chain that begins with a batch norm."""
    norm, residual = chain.first, chain.residual
    x, weight, bias = (argument_of(norm, name) for name in ("input", "weight", "bias"))
    eps, otherwise = float(argument_of(norm, "eps")), activation_function(chain)
    by = NormAct(eps, chain.activation, otherwise, overwrites=is_read_once(module, x))
    replace_by_module(module, chain.end, f"norm_of_{norm.name}", by, (x, weight, bias, residual))


def is_read_once(module: GraphModule, node: Node) -> bool:
    """Return whether a value is the result of a convolution, and only one operator reads it."""
    by = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(by, PrefixConv) and len(node.users) == 1


def activation_function(chain: Chain) -> Callable[[Tensor], Tensor]:
    """Return torch's function for the activation of a chain."""
    if chain.activation == "identity":
        return lambda x: x
    node = chain.end
    target, rest, named = cast("Callable[..., Tensor]", node.target), node.args[1:], dict(node.kwargs)
    return lambda x: target(x, *rest, **named)
