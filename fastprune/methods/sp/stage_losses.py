"""The losses of candidates, sub-networks of stages or of the whole network, in this process or shared among ranks.

With Ŷ [N, C, H, W] the full network's features at the end of a stage and Y a candidate's after its adaptor, they are

    mse       mean (Y − Ŷ)² over batch, channels and pixels
    channel   1/C Σ (Y − Ŷ)² over channels and pixels, the mean over the batch                               (eq. 7)
    fisher    ½ E⟨∂CE/∂Ŷ, Y − Ŷ⟩², the inner product over channels and pixels of an image
    network   the cross-entropy of the whole sub-network, which reads no feature of the full one

The first two differ by the number of pixels, a factor for one stage and a choice between stages: on CIFAR's three
resolutions they weigh stages 1:1:1 and 16:4:1. ``fisher`` is the second-order estimate of what the difference adds to
the cross-entropy, so stages have one unit. The first three add up over stages; ``network`` has no stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from fastprune.host.distributed import Distributed
from fastprune.methods.sp.fitted_adaptors import FittedAdaptor, split_rows
from fastprune.methods.sp.stage_graphs import ADAPTOR
from fastprune.networks.subnetworks import SubNetworks
from fastprune.training.objective import Objective, main_scores

Query = tuple[int, Tensor]
"""A sub-network: the number of a stage, and a mask over the stage's own units, bool."""

Proxy = Literal["mse", "channel", "fisher", "network"]
PROXIES: tuple[Proxy, ...] = get_args(Proxy)


@dataclass(frozen=True)
class StageData:
    """One stage with its input and output in the full network; or the whole network with images and labels.

    Args:
        networks: the sub-networks of the stage, with its adaptor. With ``fitted`` the adaptor must be the identity.
        features: the input, [N, C, H, W].
        target: the output, [N, C', H', W']; labels for the proxy ``network``.
        proxy: the loss.
        fitted: whether each candidate gets its own adaptor in closed form.
        gradient: the gradient of each image's loss in the full network with respect to ``target``, for ``fisher``.
    """

    networks: SubNetworks
    features: Tensor
    target: Tensor
    proxy: Proxy = "mse"
    fitted: bool = False
    gradient: Tensor | None = None

    @torch.no_grad()
    def loss(self, mask: Tensor) -> float:
        """Compute the loss of the sub-network of a mask over the stage's own units, as a float32.

        Sums are taken in float64, which makes them independent of the number of threads.
        """
        return self.compare(self.networks(self.features, mask=mask), mask)

    def compare(self, output: Tensor, mask: Tensor) -> float:
        """Compute the loss from what the sub-network of a mask returns."""
        if self.proxy == "network":
            return float(Objective().compute(main_scores(output).double(), self.target).float())
        if self.fitted:
            return float(self.compare_fitted(output[:, self.kept_features(mask)]).float())
        difference = output.float() - self.target.float()
        if self.proxy == "fisher":
            assert self.gradient is not None
            slopes = (difference.double() * self.gradient.double()).flatten(1).sum(1)
            return float((slopes.square().mean() / 2).float())
        mean = difference.double().square_().sum() / difference.numel()
        return float((mean * (self.pixels if self.proxy == "channel" else 1)).float())

    def compare_fitted(self, narrow: Tensor) -> Tensor:
        """Compute the loss of a candidate's features [N, kept, H', W'] after their best adaptor."""
        adaptor = FittedAdaptor.fit(narrow, self.target)
        if self.proxy != "fisher":
            return adaptor.error * (self.pixels if self.proxy == "channel" else 1)
        assert self.gradient is not None
        pairs = zip(adaptor.differences(narrow, self.target), split_rows(self.gradient), strict=True)
        slopes = [
            (difference * gradient).view(-1, self.pixels * len(adaptor.bias)).sum(1) for difference, gradient in pairs
        ]
        return torch.cat(slopes).square().mean() / 2

    @property
    def pixels(self) -> int:
        """The number of pixels of a feature."""
        return self.target[0, 0].numel()

    def kept_features(self, mask: Tensor) -> Tensor:
        """Return the indices of the stage's features that stay under a mask over its own units."""
        stays = torch.cat([mask, torch.ones(1, dtype=torch.bool)])  # the last place is that of -1: always kept
        kept = torch.ones(self.target.shape[1], dtype=torch.bool)
        for piece in self.networks.graph.slices:  # none where the features of a stage keep their width
            if piece.tensor == f"{ADAPTOR}.weight" and piece.dim == 1:
                kept = stays[piece.units]
        return kept.nonzero().flatten().to(self.target.device)


def make_stage_data(
    networks: Sequence[SubNetworks],
    features: Sequence[Tensor],
    *,
    proxy: Proxy = "mse",
    fitted: bool = False,
    gradients: Sequence[Tensor] | None = None,
) -> list[StageData]:
    """Freeze consecutive stages and pair them with their features, channels_last on the CPU, where it is faster.

    Args:
        networks: the sub-networks of each stage.
        features: the input of the first stage, then the output of each stage.
        proxy: the loss of all stages.
        fitted: whether each candidate gets its own adaptor.
        gradients: the gradients for the proxy ``fisher``, one for each stage.

    Raises:
        ValueError: if there are too few pixels to fit adaptors on.
    """
    laid_out = [lay_out(x) for x in features]
    slopes = [None] * len(networks) if gradients is None else [lay_out(x) for x in gradients]
    stages = [
        StageData(n.freeze(), x, y, proxy, fitted, slope)
        for n, (x, y), slope in zip(networks, pairwise(laid_out), slopes, strict=True)
    ]
    if fitted:
        check_pixels(features[1:], len(features[0]))
    return stages


def check_pixels(outputs: Sequence[Tensor], images: int) -> None:
    """Check that an adaptor can be fitted on the pixels of a number of images.

    Args:
        outputs: the output of each stage, [N, C, H, W], of any number N of images.
        images: the number of images to fit on.

    Raises:
        ValueError: if a stage has too few pixels.
    """
    for number, output in enumerate(outputs, 1):
        channels, pixels = output.shape[1], images * output[0, 0].numel()
        if pixels <= 2 * channels:
            raise ValueError(
                f"adaptor 'closed_form': stage {number} has {channels} features and only {pixels} pixels of "
                f"{images} held-out images to fit an adaptor on; raise images, hold more out, or give adaptor trained"
            )


def lay_out(x: Tensor) -> Tensor:
    """Return images and features on the CPU in channels_last."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" and x.dim() == 4 else x


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
