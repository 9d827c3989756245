"""Chains of a traced graph: a convolution or batch norm, and what follows it and nothing else reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastprune.graph.export.nodes import argument_of
from fastprune.graph.export.regions import MODES

aten = torch.ops.aten

ACTIVATION_OF: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
}
# The names of the bounds; relu6 where these are 0 and 6.
BOUNDED: dict[Any, tuple[str, str]] = {
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
}


@dataclass
class Chain:
    """A convolution with its batch norm, or a batch norm alone, then a sum and an activation.

    Args:
        first: the convolution or the batch norm.
        end: the node whose value the chain computes.
        norm: the batch norm, if there is one.
        sum: the node that adds a residual, if there is one.
        activation: its name in the kernels.
    """

    first: Node
    end: Node
    norm: Node | None = None
    sum: tuple[Node, int] | None = None  # and the place of the residual among its arguments
    activation: str = "identity"

    @property
    def residual(self) -> Any:
        """What is added before the activation, if anything is."""
        if self.sum is None:
            return None
        node, place = self.sum
        return node.args[place]


def find_chains(module: GraphModule, begins: Callable[[Node], bool]) -> list[Chain]:
    """Find the chains of a graph; a node belongs to one chain at most, and a chain to one region of a mode.

    Args:
        module: the graph.
        begins: whether a chain begins at a node.
    """
    region, regions = 0, {}
    for node in module.graph.nodes:
        region += node.target in MODES
        regions[node] = region
    chains = []
    taken: set[Node] = set()
    for node in filter(begins, module.graph.nodes):
        chain = Chain(node, node, norm=node if node.target is aten.batch_norm.default else None)
        while len(chain.end.users) == 1:
            (following,) = chain.end.users
            if following in taken or regions[following] != regions[node] or not extend(chain, following):
                break
            taken.add(following)
        chains.append(chain)
    return chains


def extend(chain: Chain, node: Node) -> bool:
    """Take one more node into a chain if it may follow there; return whether it does."""
    if chain.activation != "identity":
        return False
    if chain.norm is None and chain.sum is None and is_frozen_norm(node):
        chain.norm = node
    elif chain.sum is None and (place := residual_place(node, chain.end)) is not None:
        chain.sum = node, place
    elif activation := activation_of(node):
        chain.activation = activation
    else:
        return False
    chain.end = node
    return True


def is_frozen_norm(node: Node) -> bool:
    """Return whether a node is a batch norm in eval mode with parameters and statistics that the module holds."""
    if node.target is not aten.batch_norm.default or argument_of(node, "training"):
        return False
    statistics = [argument_of(node, name) for name in ("running_mean", "running_var")]
    affine = [argument_of(node, name) for name in ("weight", "bias")]
    return all(map(is_stored, statistics)) and all(tensor is None or is_stored(tensor) for tensor in affine)


def residual_place(node: Node, end: Node) -> int | None:
    """Return the place of what a plain sum adds to ``end``; None for other nodes, and for sums that broadcast."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    place = 1 if node.args[0] is end else 0
    other = node.args[place]
    return place if isinstance(other, Node) and other is not end and are_alike(other, end) else None


def activation_of(node: Node) -> str | None:
    """Return the name of the activation that a node computes, if the kernels have it."""
    if node.target in BOUNDED:
        lowest, highest = (argument_of(node, name) for name in BOUNDED[node.target])
        return "relu6" if (lowest, highest) == (0, 6) else None
    return ACTIVATION_OF.get(node.target)


def is_stored(node: Any) -> bool:
    """Return whether a node is a parameter or a buffer."""
    return isinstance(node, Node) and node.op == "get_attr"


def are_alike(a: Node, b: Node) -> bool:
    """Return whether two values are known to be tensors of one shape, whatever the batch, and of one dtype.

    Nothing is known of the tensors that a rewritten graph takes as inputs.
    """
    x, y = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    return x.dtype == y.dtype and [*map(str, x.shape)] == [*map(str, y.shape)]
