"""group_prox_ beside ways to compute with torch one unit norm over several tensors.

``loop`` goes layer by layer in plain torch. ``foreach`` computes the norms of all layers first and then scales all
tensors with ``torch._foreach_mul_``. Every call changes the weights in place for the next one, as in training.
Thresholds are a ten-thousandth of each unit's first norm: enough to change every element, and a hundred calls leave
99 % of it.

The bytes are those of one pass: each element in and out, thresholds in, norms out. Where no cache holds the elements
between norms and scaling, they are read a second time, and two thirds of the roofline are the best possible.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import ops
from fastprune.bench.case import Case
from fastprune.bench.shapes import torchvision_network

SWEEP = [1_000, 10_000, 100_000, 1_000_000]
SHRINKAGE = 1e-4

Layer = list[tuple[Tensor, int]]
"""The tensors of one layer's units, each with the dimension on which unit k has position k."""

Result = tuple[Tensor, list[Tensor]]
"""The norms and the changed tensors."""


class Layout:
    """Layers whose units all stay above 0, so that every call reads and writes every element.

    Each variant has tensors of its own, so that none profits from another one's cache, and all have taken the same
    number of steps when their results are compared.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self.sizes = [layer[0][0].size(layer[0][1]) for layer in layers]
        self.loops, self.foreachs = clone_layers(layers), clone_layers(layers)
        slices, first = [], 0
        for layer, size in zip(layers, self.sizes, strict=True):
            slices += [(tensor, dim, torch.arange(first, first + size)) for tensor, dim in layer]
            first += size
        self.table = ops.UnitTable(slices, first)
        self.units = first
        self.elements = int(self.table.sizes.sum())
        self.threshold = self.table.norms() * SHRINKAGE
        self.thresholds = self.threshold.split(self.sizes)
        # In the same order for all variants, for the comparison.
        self.tensors, self.loop_tensors, self.foreach_tensors = (
            [tensor for layer in each for tensor, _ in layer] for each in (layers, self.loops, self.foreachs)
        )

    @property
    def bytes(self) -> int:
        """The bytes of elements in and out, thresholds in and norms out."""
        return 2 * (self.elements + self.units) * self.threshold.element_size()

    def draw(self) -> tuple[()]:
        """Return no inputs: the layout holds the weights."""
        return ()

    def loop(self) -> Result:
        """Shrink layer by layer."""
        norms = []
        for layer, threshold in zip(self.loops, self.thresholds, strict=True):
            norms.append(norms_of(layer))
            factor = (1 - threshold / norms[-1]).clamp_(min=0)
            for tensor, dim in layer:
                tensor.mul_(broadcast(factor, tensor, dim))
        return torch.cat(norms), self.loop_tensors

    def foreach(self) -> Result:
        """Compute the factors of all layers at once, then scale all tensors in one call."""
        norms = torch.cat([norms_of(layer) for layer in self.foreachs])
        factors = (1 - self.threshold / norms).clamp_(min=0).split(self.sizes)
        by_tensor = [
            broadcast(factor, tensor, dim)
            for layer, factor in zip(self.foreachs, factors, strict=True)
            for tensor, dim in layer
        ]
        torch._foreach_mul_(self.foreach_tensors, by_tensor)
        return norms, self.foreach_tensors

    def fastprune(self) -> Result:
        """Call the fused operator."""
        return ops.group_prox_(self.table, self.threshold), self.tensors


def clone_layers(layers: list[Layer]) -> list[Layer]:
    """Copy the tensors with their strides."""
    return [[(tensor.clone(), dim) for tensor, dim in layer] for layer in layers]


def norms_of(layer: Layer) -> Tensor:
    """Return the norms of a layer's units over all of its tensors."""
    norms = [
        torch.linalg.vector_norm(tensor, dim=[d for d in range(tensor.ndim) if d != dim])
        if tensor.ndim > 1
        else tensor.abs()
        for tensor, dim in layer
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def broadcast(factor: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """View a factor in a shape that broadcasts to the tensor."""
    return factor.view([-1 if d == dim else 1 for d in range(tensor.ndim)])


def resnet50(device: torch.device, *, consumers: bool) -> list[Layer]:
    """Return a layer for each batch norm: the convolution's rows before it, its weight and its bias.

    With ``consumers`` also the columns of the next convolution, inside bottlenecks only: several batch norms share a
    residual stream's channels.
    """
    model = torchvision_network("ResNet-50").requires_grad_(False).to(device)
    layers: list[Layer] = []
    convolution: Any = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            convolution = module
            if consumers and name.endswith(("conv2", "conv3")):
                layers[-1].append((module.weight, 1))
        if isinstance(module, nn.BatchNorm2d):
            layers.append([(convolution.weight, 0), (module.weight, 0), (module.bias, 0)])
    if consumers:  # a convolution's elements belong either to its rows or to its columns
        read = {id(tensor) for layer in layers for tensor, dim in layer if dim == 1}
        layers = [[(t, dim) for t, dim in layer if dim == 1 or id(t) not in read] for layer in layers]
    return layers


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Yield sweeps over units of one element and of 64, and all units of a ResNet-50 in two ways."""
    if quick:
        weight, gamma = torch.randn(20, 30, 3, 3, device=device), torch.rand(30, device=device)
        yield case("20 rows and 30 columns", [[(torch.randn(20, 50, device=device), 0)], [(weight, 1), (gamma, 0)]])
        return
    for elements in (1, 64):
        for units in SWEEP:
            shape = (units,) if elements == 1 else (units, elements)
            yield case(f"{units:,} units of {elements}", [[(torch.randn(shape, device=device), 0)]])
    for name, consumers in (("rows", False), ("rows and columns", True)):
        yield case(f"ResNet-50: {name}", resnet50(device, consumers=consumers))


def case(name: str, layers: list[Layer]) -> Case:
    """Return the case of one layout."""
    layout = Layout(layers)
    variants = {"loop": layout.loop, "foreach": layout.foreach, "fastprune": layout.fastprune}
    shape = {"units": layout.units, "elements": layout.elements, "tensors": sum(map(len, layers))}
    return Case(
        name,
        layout.draw,
        variants,
        bytes=layout.bytes,
        shape=shape,
        units=layout.units,
        clock="events",
        rounds=100,
    )
