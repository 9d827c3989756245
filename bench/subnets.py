"""One evaluation of SP's search: a sub-network of every stage, on slices of the weights or behind masks.

    python bench/subnets.py --json subnets.json     # --help lists the options

``eager`` is what one writes without slices: the stage at full width, with a mask on the channels of each layer, on the
CPU also in channels_last. ``library`` is our slices with torch's own operators, as in training; ``fastprune`` those of
the search, on our kernels on the CPU. All take batch statistics, and have to give the same features. Widths are random,
a half of each group's on average, and new in every round, so that rewriting the stage's graph for them is a part of our
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.bench.case import OURS, Case
from fastprune.bench.run import run_program
from fastprune.bench.step import TOLERANCE, networks, prepared
from fastprune.graph import ChannelGraph, find_stages, trace
from fastprune.methods.sp.stage_losses import make_stage_data
from fastprune.methods.sp.supernet import StageNetwork, SuperNet
from fastprune.networks.masked import build_gated_graph
from fastprune.networks.subnetworks import SubNetworks
from fastprune.networks.traced_copy import share_tensors, use_batch_statistics

LEAST = 0.1  # of the widths' ratios, which are between this and 0.9


class Masked:
    """The sub-networks of a stage at full width.

    Args:
        part: the stage.
    """

    def __init__(self, part: StageNetwork) -> None:
        own, model = part.slices.graph, part.slices.model
        self.part = part
        self.network = build_gated_graph(own, torch.ones(own.num_units, dtype=torch.bool), fused=False)
        use_batch_statistics(self.network, update=False)
        share_tensors(model, self.network)

    def __call__(self, features: Tensor, mask: Tensor) -> Tensor:
        """The stage's features; ``mask`` [U] is that of the whole network."""
        (found,) = self.network(features, self.part.own_mask(mask).to(features))
        return found  # type: ignore[no-any-return]


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Evaluations of ResNet-56 and ResNet-50."""
    for name, (make, batch, side) in networks(device, quick=quick).items():
        model = prepared(make(), device, torch.float32)
        graph = trace(model, torch.zeros(1, 3, side, side, device=device))
        yield case(name, model, graph, batch, side, device)


def searching(part: StageNetwork, networks: SubNetworks, features: Tensor, mask: Tensor) -> Tensor:
    """The features of a stage as the search computes them; ``mask`` [U] is that of the whole network."""
    return networks(features, mask=part.own_mask(mask))  # type: ignore[no-any-return]


def case(name: str, model: nn.Module, graph: ChannelGraph, batch: int, side: int, device: torch.device) -> Case:
    """Evaluations of one network."""
    net = SuperNet(graph, model, find_stages(graph))
    features = net.features(torch.randn(batch, 3, side, side, device=device))
    decided = [graph.groups[g] for stage in net.stages for g in stage.groups]

    def draw() -> tuple[Tensor]:
        mask = torch.ones(graph.num_units, dtype=torch.bool)
        for group, ratio in zip(decided, LEAST + (1 - 2 * LEAST) * torch.rand(len(decided)), strict=True):
            mask[group.start + max(1, int(ratio * group.size)) : group.start + group.size] = False
        return (mask,)

    def through(parts: Sequence[Any], inputs: Sequence[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        @torch.no_grad()
        def evaluate(mask: Tensor) -> tuple[Tensor, ...]:
            return tuple(part(x, mask) for part, x in zip(parts, inputs, strict=False))

        return evaluate

    masked = [Masked(part) for part in net.parts]
    searched = make_stage_data([part.slices for part in net.parts], features)
    last = [stage.features for stage in searched]
    variants = {"eager": through(masked, features)}
    if device.type == "cpu":
        variants["eager channels_last"] = through(masked, last)
    variants["library"] = through(net.parts, features)
    variants[OURS] = through(
        [partial(searching, part, stage.networks) for part, stage in zip(net.parts, searched, strict=True)], last
    )
    macs = sum(float(part.slices.graph.cost().macs) for part in net.parts)
    return Case(
        f"sub-networks, {name}, batch {batch}",
        draw,
        variants,
        bytes=float(sum(x.numel() * x.element_size() for x in features)),
        flops=2 * 0.25 * macs * batch,
        precision="float32",
        shape={"network": name, "batch": batch, "side": side},
        samples=batch,
        norm=TOLERANCE[torch.float32],
        fresh=True,
        clock="events" if device.type == "cuda" else "wall",
        rounds=30,
        seconds=8.0 if device.type == "cuda" else 60.0,
    )


if __name__ == "__main__":
    run_program({"subnets": cases})
