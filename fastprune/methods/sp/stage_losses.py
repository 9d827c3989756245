"""The distillation losses of sub-networks of stages, measured in this process or shared among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastprune.host.distributed import Distributed
from fastprune.networks.subnetworks import SubNetworks

Query = tuple[int, Tensor]
"""A sub-network: the number of a stage, and a mask over the stage's own units, bool."""


@dataclass(frozen=True)
class StageData:
    """One stage with its input and output in the full network.

    Args:
        networks: the sub-networks of the stage, with its adaptor.
        features: the input, [N, C, H, W].
        target: the output, [N, C', H', W'].
    """

    networks: SubNetworks
    features: Tensor
    target: Tensor

    @torch.no_grad()
    def loss(self, mask: Tensor) -> float:
        """Compute eq. 7 for the sub-network of a mask over the stage's own units, as a float32.

        The sum is taken in float64, which makes it independent of the number of threads.
        """
        difference = self.networks(self.features, mask=mask).float() - self.target.float()
        return float((difference.double().square_().sum() / difference.numel()).float())


def make_stage_data(networks: Sequence[SubNetworks], features: Sequence[Tensor]) -> list[StageData]:
    """Freeze consecutive stages and pair them with their features, channels_last on the CPU, where it is faster.

    Args:
        networks: the sub-networks of each stage.
        features: the input of the first stage, then the output of each stage.
    """
    laid_out = [
        x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" and x.dim() == 4 else x
        for x in features
    ]
    return [StageData(n.freeze(), x, y) for n, (x, y) in zip(networks, pairwise(laid_out), strict=True)]


class LocalLosses:
    """Losses measured in this process, or in all processes of a ``torchrun`` job, which must all call it.

    Args:
        stages: the stages of the network.
        peers: this process among its peers.
    """

    def __init__(self, stages: Sequence[StageData], peers: Distributed) -> None:
        self.stages, self.peers = stages, peers
        self.device = stages[0].features.device

    def __call__(self, queries: Sequence[Query]) -> list[float]:
        """Measure the losses of sub-networks."""
        losses = torch.zeros(len(queries), dtype=torch.float64, device=self.device)
        for number in range(self.peers.rank, len(queries), self.peers.world_size):
            stage, mask = queries[number]
            losses[number] = self.stages[stage].loss(mask)
        total: list[float] = self.peers.sum_(losses).tolist()
        return total
