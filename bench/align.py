"""The overhead of SANP in a training step: the proximal step on closed channels, and a generator step in twenty.

    python bench/align.py --json align.json         # --help lists the options

``training`` is a step of the network's weights alone. ``fastprune`` adds the proximal step of
:class:`fastprune.methods.gates.sanp.SANP`, one call for all layers; ``eager`` adds it as a loop over layers in torch.
Both must end at the same weights. ``generator`` is a step of the generator on the frozen, masked network.

    overhead = (fastprune + generator / 20) / training − 1

``all memory`` is the weights, the memory kept from step to step, and the most that a step allocates on top: with
SANP's proximal step over without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastprune.bench.case import OURS, Case
from fastprune.bench.memory import memory_of
from fastprune.bench.run import run_program
from fastprune.bench.search import weights_of
from fastprune.bench.step import TOLERANCE, Network, draw_batch, networks, prepare
from fastprune.data import load_data
from fastprune.engine import HeldOut, Placement
from fastprune.graph import ChannelGraph, trace
from fastprune.host.distributed import Distributed
from fastprune.methods.contract import Task
from fastprune.methods.gates.sanp import SANP, SANPConfig
from fastprune.planning.budget import Budget

PENALTY = 1.0  # small enough to leave every channel above zero while the clock runs
CLOSED = 0.5  # share of the gates


class AlignmentRun:
    """SANP in the middle of a run: half of the gated channels, drawn at random, are closed.

    Args:
        graph: channel graph of the network.
        model: the network; the run trains a copy.
        placement: device, precision and memory layout.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, placement: Placement) -> None:
        self.placement = placement
        self.model = copy.deepcopy(model).requires_grad_().train()
        data = HeldOut(load_data("synthetic:3x8x8:4:64", held_out=0), placement, Distributed())
        self.task = Task(self.model, graph, Budget("flops", 0.5), device=placement.device, data=data)
        self.method = SANP(SANPConfig(lr=1e-3, schedule="constant", penalty=PENALTY, batch_size=64))
        self.method.setup(self.task)
        gates = len(self.method.placement.index)
        closed = torch.rand(gates, generator=torch.Generator().manual_seed(1)) < CLOSED
        self.method.gates = lambda: 1.0 - closed.float().to(placement.device)  # type: ignore[method-assign]
        self.method.choose_channels()

    def train(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Do a step of the weights alone and return the weights."""
        with self.placement.autocast():
            self.method.weight_step(images, labels)
        return self.weights()

    def align(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Do a step of the weights with the proximal step and return the weights."""
        with self.placement.autocast():
            self.method.align_step(images, labels)
        return self.weights()

    def align_by_loop(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Do the same step with a loop over the layers in torch."""
        rate = self.method.training.learning_rate
        with self.placement.autocast():
            self.method.weight_step(images, labels)
        shrink(self.layers(), rate * PENALTY)
        return self.weights()

    def train_generator(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Do a step of the generator, choose channels, and return the loss."""
        increment_version(list(self.model.parameters()))  # makes the network fold the changed weights again
        with self.placement.autocast():
            metrics = self.method.generator_step(self.task, images, labels)
        return (torch.as_tensor(metrics["generator_loss"]),)

    def layers(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, Tensor]]:
        """Return the gated convolutions with their batch norms and the share of the penalty for each channel."""
        if not hasattr(self, "_layers"):
            names = {module: name for name, module in self.model.named_modules()}
            shares = {group.producers[0]: self.method.balance[group.units] for group in self.task.graph.groups}
            pairs = [pair for block in Network(self.model).blocks for pair in block.layers[:-1]]
            self._layers = [(conv, bn, shares[names[conv]]) for conv, bn in pairs]
        return self._layers

    def weights(self) -> tuple[Tensor, ...]:
        """Return the weights of all convolutions."""
        return tuple(p.detach() for p in self.model.parameters() if p.dim() == 4)


@torch.no_grad()
def shrink(layers: list[tuple[nn.Conv2d, nn.BatchNorm2d, Tensor]], strength: float) -> None:
    """Do the proximal step as a loop: compute the norms of each layer's channels and shrink them."""
    for conv, bn, balance in layers:
        parts = [conv.weight.flatten(1), bn.weight[:, None], bn.bias[:, None]]
        norms = torch.cat(parts, 1).norm(dim=1)
        factor = (1 - strength * balance / norms.clamp(min=1e-12)).clamp(min=0)
        conv.weight.mul_(factor.view(-1, 1, 1, 1))
        bn.weight.mul_(factor)
        bn.bias.mul_(factor)


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Yield a training step of ResNet-56 and of ResNet-50."""
    placement = Placement(device, "bf16" if device.type == "cuda" else "float32")
    for name, (make, batch, side) in networks(device, quick=quick).items():
        model = prepare(make(), device, torch.float32)
        graph = trace(model, torch.zeros(1, 3, side, side, device=device))
        yield case(name, model, graph, batch, side, placement)


def case(name: str, model: nn.Module, graph: ChannelGraph, batch: int, side: int, placement: Placement) -> Case:
    """Return the case of a step of one network."""
    device = placement.device
    draw = partial(draw_batch, batch, side, int(model.fc.out_features), device)  # type: ignore[union-attr, arg-type]
    start = partial(AlignmentRun, graph, model, placement)

    def more() -> dict[str, Any]:
        ours, plain = (memory_of(step, draw(), device) for step in (start().align, start().train))
        weights = weights_of(model)
        return {"all memory": (weights + ours.kept + ours.peak) / (weights + plain.kept + plain.peak)}

    variants: dict[str, Callable[..., Any]] = {
        "eager": start().align_by_loop,
        "training": start().train,
        "generator": start().train_generator,
        OURS: start().align,
    }
    macs = float(graph.cost().macs)
    return Case(
        f"sanp, {name}, batch {batch}",
        draw,
        variants,
        bytes=float(weights_of(model)),
        flops=2 * 3 * macs * batch,  # forward, and backward into inputs and weights
        precision="bfloat16" if placement.precision == "bf16" else "float32",
        shape={"network": name, "batch": batch, "side": side},
        samples=batch,
        norm=TOLERANCE[torch.bfloat16 if placement.precision == "bf16" else torch.float32],
        unchecked=("training", "generator"),
        rounds=30,
        seconds=8.0 if device.type == "cuda" else 60.0,
        more=more,
    )


def overheads(cases: list[Mapping[str, Any]], every: int = SANPConfig.every) -> dict[str, float]:
    """Return the overhead of SANP relative to training, by case name.

    Args:
        cases: cases in the benchmark's document.
        every: steps of the weights per step of the generator.
    """
    result = {}
    for row in cases:
        median = {name: float(variant["median_seconds"]) for name, variant in row["variants"].items()}
        result[row["name"]] = (median[OURS] + median["generator"] / every) / median["training"] - 1
    return result


def main() -> None:
    """Time the cases and print the overheads."""
    document = run_program({"align": cases})
    for title, overhead in overheads(document["kernels"]["align"]["cases"]).items():
        print(f"{title}: {overhead:+.1%} of the time of training alone")


if __name__ == "__main__":
    main()
