"""The observed network: the traced graph, which keeps what every layer reads and returns."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph, Layer
from fastprune.graph.export.regions import GRADIENTS, restore_modes
from fastprune.networks.traced_copy import copy_traced, make_out_of_place, return_flat, share_tensors


@dataclass(frozen=True)
class Reading:
    """What one layer read and returned.

    Args:
        layer: the layer.
        node: its node in the graph.
        x: what it read; a view of its own, so that its gradient is that of this layer's part alone.
        y: what it returned.
    """

    layer: Layer
    node: Node
    x: Tensor
    y: Tensor


class ObservedNetwork:
    """A network in eval mode that is called as the model is and keeps the readings of its last call.

    Args:
        graph: the traced network.
        model: the model that was traced; its parameters are shared, not copied.
        layers: the layers to observe; None = all.

    Attributes:
        readings: the readings of the last call, in the order of execution.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, layers: Sequence[Layer] | None = None) -> None:
        self.module = copy_traced(graph)
        codegen: Any = graph.traced.evaluation.graph._codegen
        self.out_spec: pytree.TreeSpec = codegen.pytree_info.out_spec
        for node in reversed(list(self.module.graph.nodes)):
            if node.target in GRADIENTS:  # these would hide a layer's gradient
                self.module.graph.erase_node(node)
        return_flat(self.module)
        make_out_of_place(self.module)
        share_tensors(model, self.module)
        self.layers = {layer.node: layer for layer in (graph.layers if layers is None else layers)}
        self.signature = inspect.signature(model.forward)
        self.readings: list[Reading] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's outputs."""
        self.readings = []
        inputs = self.signature.bind(*args, **kwargs).arguments.values()
        with restore_modes():
            outputs = _Observer(self.module, self.layers, self.readings).run(*inputs)
        return pytree.tree_unflatten(outputs, self.out_spec)

    def input_gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradient of a scalar with respect to what each layer read; 0 where it does not depend on it."""
        return gradients(loss, [reading.x for reading in self.readings])

    def output_gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradient of a scalar with respect to what each layer returned."""
        return gradients(loss, [reading.y for reading in self.readings])


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients of a scalar with respect to tensors; 0 for those that it does not depend on."""
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors, found, strict=True)]


class _Observer(Interpreter):
    """Executes a graph and notes what layers read and return."""

    def __init__(self, module: GraphModule, layers: dict[str, Layer], readings: list[Reading]) -> None:
        super().__init__(module)
        self.layers, self.readings = layers, readings

    def run_node(self, n: Node) -> Any:
        """Return the node's value; that of a layer is noted."""
        layer = self.layers.get(n.name)
        if layer is None:
            return super().run_node(n)
        (x, *args), kwargs = self.fetch_args_kwargs_from_env(n)
        if torch.is_grad_enabled():
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        y = self.call_function(n.target, (x, *args), kwargs)
        self.readings.append(Reading(layer, n, x, y))
        return y
