"""Sub-networks of a network whose weights stay as they are: on the CPU by our own kernels.

The first rows and columns of a weight lie in the packed weight where the kernels read them, so that each weight is
packed once for all widths, or twice, as few channels take another algorithm. Batch statistics, batch norm and
activation are two passes over what a convolution makes.
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
from fastprune.networks.fusion import activation_of, same_kind, value_of, version
from fastprune.ops.conv.library import IN_PLACE, Geometry
from fastprune.ops.conv.packed import PackedWeight, algorithm_for, convolve_prefix, pack, takes
from fastprune.ops.masked_bn_act import batch_norm_in_place, masked_bn_act

aten = torch.ops.aten


class PrefixConv(nn.Module):
    """A convolution with the first rows and columns of a weight, without gradients.

    Args:
        full: gives the whole weight.
        moves: stride, padding and dilation.
    """

    def __init__(self, full: Callable[[], Tensor], moves: Mapping[str, Any]) -> None:
        super().__init__()
        self.full, self.moves = full, dict(moves)
        self._packed: dict[str, tuple[Any, PackedWeight]] = {}  # by algorithm

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """The convolution of x [N, c, H, W] with ``weight`` [k, c / groups, R, S], mostly a view of the whole one."""
        geometry = Geometry(**self.moves, groups=groups)
        if not (x.dim() == 4 and runs_here(x) and takes(x, weight, geometry)):
            return F.conv2d(x, weight, bias, **self.moves, groups=groups)
        algorithm = algorithm_for(weight, geometry, x.shape[1])
        return convolve_prefix(x, self.packed(weight, geometry, algorithm), weight.shape[0], bias)

    def packed(self, weight: Tensor, geometry: Geometry, algorithm: str) -> PackedWeight:
        """The whole weight; where what is wanted lies otherwise in it, that alone."""
        full = self.full()
        grouped = geometry.groups > 1 and full.shape[1] > 1  # depthwise in this sub-network alone
        if not is_prefix(weight, full) or grouped or full.is_inference():  # these do not tell that they have changed
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
        activation: by its name in the kernels.
        otherwise: the activation, for what the kernels do not take.
        overwrites: whether nobody else reads x: new memory costs more than the arithmetic.
    """

    def __init__(self, eps: float, activation: str, otherwise: Callable[[Tensor], Tensor], *, overwrites: bool) -> None:
        super().__init__()
        self.eps, self.activation, self.otherwise, self.overwrites = eps, activation, otherwise, overwrites

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """``act(bn(x) + residual)`` of x [N, C, ...]."""
        if not runs_here(x) or x.numel() <= x.shape[1]:  # of a single value torch's function makes the bias
            y = torch.batch_norm(x, weight, bias, None, None, True, 0.1, self.eps, torch.backends.cudnn.enabled)
            return self.otherwise(y if residual is None else y + residual)
        activation = self.activation if residual is None else "identity"
        if self.overwrites:
            y = batch_norm_in_place(x, weight, bias, activation=activation, eps=self.eps)
        else:
            y = masked_bn_act(x, (weight, bias, None, None), activation=activation, eps=self.eps, training=True)
        return y if residual is None else IN_PLACE[self.activation](y.add_(residual))


def runs_here(x: Tensor) -> bool:
    """Whether the kernels compute a tensor without gradients as the library would."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and not torch.is_grad_enabled()


def is_prefix(part: Tensor, full: Tensor) -> bool:
    """Whether a tensor is a view of the first rows and columns of another."""
    return part.data_ptr() == full.data_ptr() and part.stride() == full.stride() and part.dim() == 4


def use_kernels(written: RewrittenGraph, source: GraphModule, made: dict[Any, nn.Module]) -> None:
    """Replace the convolutions and batch norms of a rewritten graph, which is changed.

    Args:
        written: of ``rewrite``; nothing in it writes into a tensor.
        source: holds the whole tensors that the graph takes slices of, by the same names.
        made: convolutions by their weight, which later graphs use again.
    """
    module, count = written.module, len(written.tensors) + len(written.indices)
    inputs = module.graph.find_nodes(op="placeholder")
    weights = dict(zip(inputs[len(inputs) - count :], written.tensors, strict=False))
    for node in list(module.graph.nodes):
        if node.target is aten.conv2d.default and argument_of(node, "weight") in weights:
            name = weights[argument_of(node, "weight")]
            replace_conv(module, node, name, partial(attribute_of, source, name), made)
        elif node.target is aten.batch_norm.default and argument_of(node, "training"):
            replace_norm(module, node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # what lies in channels_last cannot be viewed as planes
    module.graph.eliminate_dead_code()
    module.recompile()


def replace_conv(
    module: GraphModule, node: Node, weight: str, full: Callable[[], Tensor], made: dict[Any, nn.Module]
) -> None:
    """Let a :class:`PrefixConv` compute a node."""
    given = {name: tuple(argument_of(node, name)) for name in ("stride", "padding", "dilation")}
    moves = {name: numbers * 2 if len(numbers) == 1 else numbers for name, numbers in given.items()}
    conv = made.setdefault((weight, *moves.values()), PrefixConv(full, moves))
    read = tuple(argument_of(node, name) for name in ("input", "weight", "bias", "groups"))
    call(module, node, f"conv_of_{node.name}", conv, read)


def replace_norm(module: GraphModule, node: Node) -> None:
    """Let a :class:`NormAct` compute a node, and a sum and an activation if nothing else reads what is before them."""
    end, residual, activation, otherwise = node, None, "identity", None
    following = only_reader(end)
    if following is not None and following.target is aten.add.Tensor and not following.kwargs:
        a, b = following.args
        other = b if a is end else a
        if isinstance(other, Node) and other is not end and alike(other, end):
            end, residual, following = following, other, only_reader(following)
    if following is not None and (named := activation_of(following)):
        end, activation, otherwise = following, named, following
    overwrites = is_new(module, argument_of(node, "input"))
    norm = NormAct(float(argument_of(node, "eps")), activation, applied(otherwise), overwrites=overwrites)
    read = (argument_of(node, "input"), argument_of(node, "weight"), argument_of(node, "bias"), residual)
    call(module, end, f"norm_of_{node.name}", norm, read)


def is_new(module: GraphModule, node: Node) -> bool:
    """Whether a value is the result of a convolution, and only one operator reads it."""
    by = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(by, PrefixConv) and len(node.users) == 1


def alike(one: Node, other: Node) -> bool:
    """Whether two values are known to have one shape and dtype; inputs of a rewritten graph are not known."""
    return "val" in one.meta and "val" in other.meta and same_kind(value_of(one), value_of(other))


def only_reader(node: Node) -> Node | None:
    """The operator that reads a node's value, if it is the only one that does."""
    readers = [user for user in node.users if user.op == "call_function"]
    return readers[0] if len(readers) == len(node.users) == 1 else None


def applied(node: Node | None) -> Callable[[Tensor], Tensor]:
    """What an activation's node computes of its input."""
    if node is None:
        return lambda x: x
    target, rest, named = cast("Callable[..., Tensor]", node.target), node.args[1:], dict(node.kwargs)
    return lambda x: target(x, *rest, **named)


def call(module: GraphModule, node: Node, name: str, by: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Compute a node by a module."""
    module.add_submodule(name, by)
    with module.graph.inserting_before(node):
        computed = module.graph.call_module(name, arguments)
    computed.meta = dict(node.meta)
    node.replace_all_uses_with(computed)
    module.graph.erase_node(node)
