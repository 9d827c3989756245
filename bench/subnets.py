"""An evaluation in SP's search: a sub-network of every stage, on slices of the weights or with masks.

    python bench/subnets.py --json subnets.json     # --help lists the options

``eager`` works without slices: the stage runs at full width with a mask on the channels of each layer, on the CPU also
in channels_last. ``library`` runs our slices on torch's own operators, as in training; ``fastprune`` runs the slices of
the search, with our kernels on the CPU. All use batch statistics and must return the same features. Widths are random,
half of each group's on average, and new in every round, so that our time includes rewriting the stage's graph for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.bench.case import OURS, Case
from fastprune.bench.run import run_program
from fastprune.bench.step import TOLERANCE, networks, prepare
from fastprune.graph import ChannelGraph, Group, find_stages, trace
from fastprune.methods.sp.stage_losses import make_stage_data
from fastprune.methods.sp.supernet import StageNetwork, SuperNet
from fastprune.networks.masked import build_gated_graph
from fastprune.networks.subnetworks import SubNetworks
from fastprune.networks.traced_copy import share_tensors, use_batch_statistics

LEAST = 0.1  # least keep ratio of a group; the greatest is 0.9


class MaskedStage:
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
        """Return the stage's features for a mask [U] of the whole network."""
        (result,) = self.network(features, self.part.own_mask(mask).to(features))
        return result  # type: ignore[no-any-return]


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Yield evaluations of ResNet-56 and ResNet-50."""
    for name, (make, batch, side) in networks(device, quick=quick).items():
        model = prepare(make(), device, torch.float32)
        graph = trace(model, torch.zeros(1, 3, side, side, device=device))
        yield case(name, model, graph, batch, side, device)


def compute_features(part: StageNetwork, networks: SubNetworks, features: Tensor, mask: Tensor) -> Tensor:
    """Return the features of a stage as in the search, for a mask [U] of the whole network."""
    return networks(features, mask=part.own_mask(mask))  # type: ignore[no-any-return]


def draw_mask(graph: ChannelGraph, groups: Sequence[Group]) -> tuple[Tensor]:
    """Draw a mask [U] with random widths of the groups."""
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    for group, ratio in zip(groups, LEAST + (1 - 2 * LEAST) * torch.rand(len(groups)), strict=True):
        mask[group.start + max(1, int(ratio * group.size)) : group.start + group.size] = False
    return (mask,)


def make_variants(
    net: SuperNet, features: Sequence[Tensor], device: torch.device
) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Return the ways to evaluate the stages, as functions of a mask."""

    def evaluator(parts: Sequence[Any], inputs: Sequence[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        @torch.no_grad()
        def evaluate(mask: Tensor) -> tuple[Tensor, ...]:
            return tuple(part(x, mask) for part, x in zip(parts, inputs, strict=False))

        return evaluate

    masked = [MaskedStage(part) for part in net.parts]
    stages = make_stage_data([part.slices for part in net.parts], features)
    last = [stage.features for stage in stages]
    variants = {"eager": evaluator(masked, features)}
    if device.type == "cpu":
        variants["eager channels_last"] = evaluator(masked, last)
    variants["library"] = evaluator(net.parts, features)
    variants[OURS] = evaluator(
        [partial(compute_features, part, stage.networks) for part, stage in zip(net.parts, stages, strict=True)], last
    )
    return variants


def case(name: str, model: nn.Module, graph: ChannelGraph, batch: int, side: int, device: torch.device) -> Case:
    """Return the case of one network's evaluations."""
    net = SuperNet(graph, model, find_stages(graph))
    features = net.features(torch.randn(batch, 3, side, side, device=device))
    groups = [graph.groups[g] for stage in net.stages for g in stage.groups]
    macs = sum(float(part.slices.graph.cost().macs) for part in net.parts)
    return Case(
        f"sub-networks, {name}, batch {batch}",
        partial(draw_mask, graph, groups),
        make_variants(net, features, device),
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
