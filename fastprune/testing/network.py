"""The small network and the synthetic images on which the contract is tested."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from fastprune.data.data import SourceData
from fastprune.data.synthetic import SyntheticSource
from fastprune.graph import ChannelGraph, trace

SHAPE, NUM_CLASSES = (3, 16, 16), 10


class ContractNetwork(nn.Module):
    """A small network with every kind of coupling, in which one channel costs less than 1 % of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 16, 1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.expand = nn.Sequential(nn.Conv2d(16, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(96, 96, 3, 2, 1, groups=96, bias=False), nn.BatchNorm2d(96), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(96, 24, 1), nn.ReLU(), nn.Conv2d(24, 96, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(96, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.last = nn.Sequential(nn.Conv2d(24, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.classifier = nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [N, 10] of images [N, 3, 16, 16]."""
        x = self.stem(images)
        x = torch.relu(x + self.block(x))
        x = self.depthwise(self.expand(x))
        x = self.last(self.project(x * self.squeeze(x)))
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


def network() -> ContractNetwork:
    """Make the test network with fixed random weights and statistics, in eval mode; one parameter is frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = ContractNetwork()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    model.classifier.bias.requires_grad_(False)
    return model.eval()


@lru_cache(maxsize=1)
def traced() -> ChannelGraph:
    """Return the channel graph of the test network."""
    return trace(network(), torch.zeros(2, *SHAPE))


def sample_data() -> SourceData:
    """Make 160 synthetic training images, 32 of them held out."""
    train, test = (
        SyntheticSource.make(SHAPE, NUM_CLASSES, first, size, seed=3) for first, size in ((0, 160), (160, 32))
    )
    return SourceData("contract", SHAPE, NUM_CLASSES, train, test, np.arange(32))
