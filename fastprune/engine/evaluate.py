"""Accuracy and loss on one part of the data, exact over any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.data.batches import Split
from fastprune.data.data import Data, SourceData
from fastprune.engine.device import Placement
from fastprune.graph.model_state import in_eval_mode
from fastprune.host import progress
from fastprune.host.distributed import Distributed


class Evaluation(TypedDict):
    """Result of ``evaluate``."""

    accuracy: float
    """Top-1, in [0, 1]."""
    loss: float
    """Mean cross-entropy in nats."""
    samples: int
    """Number of samples seen, over all ranks."""


def evaluate(
    network: Callable[[Tensor], Tensor],
    data: Data,
    split: Split = "test",
    *,
    batch_size: int = 256,
    placement: Placement | None = None,
    distributed: Distributed | None = None,
) -> Evaluation:
    """Measure ``network`` on every sample of ``split`` once.

    Args:
        network: maps images [N, C, H, W] to scores [N, num_classes]. A module must be on the placement's device, and
            runs in eval mode.
        data: the data set.
        split: the part to measure on.
        batch_size: samples per step over all ranks together; changes the result by rounding only.
        placement: device, precision and layout of the computation; None = the CPU in float32.
        distributed: this process among its peers; all must call.

    Returns:
        Accuracy, loss and number of samples, the same on every rank.

    Raises:
        ValueError: if the split is empty.
    """
    peers, place = distributed or Distributed(), placement or Placement()
    totals = torch.zeros(3, dtype=torch.float64, device=place.device)  # correct, summed loss, samples
    batches = data.batches(split, max(batch_size, peers.world_size), complete=True, distributed=peers)
    modules = [network] if isinstance(network, nn.Module) else []
    work = progress.begin("evaluating", count_cheaply(data, split), wanted=peers.is_main)
    with in_eval_mode(*modules), torch.no_grad(), place.autocast(), work:
        for images, labels in batches:
            scores, targets = network(place.images(images)).float(), place.labels(labels)
            totals[0] += (scores.argmax(1) == targets).sum()
            totals[1] += F.cross_entropy(scores, targets, reduction="sum")
            totals[2] += len(targets)
            work.advance(len(targets) * peers.world_size)
    correct, loss, samples = peers.sum_(totals).tolist()
    if not samples:
        raise ValueError(f"data {data.name!r} has no {split} samples to evaluate on")
    return {"accuracy": correct / samples, "loss": loss / samples, "samples": int(samples)}


def count_cheaply(data: Data, split: Split) -> int | None:
    """Return the number of samples; None if all of a user's batches would have to be read to know it."""
    return data.size(split) if isinstance(data, SourceData) else None


@dataclass(frozen=True)
class HeldOut:
    """The data as a method sees them (the ``TaskData`` of the contract): never the test set.

    Args:
        data: the data set.
        placement: device, precision and layout of evaluations.
        distributed: this process among its peers.
        batch_size: samples per step of an evaluation over all ranks together.
    """

    data: Data
    placement: Placement
    distributed: Distributed
    batch_size: int = 256

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.data.num_classes

    @property
    def samples(self) -> int:
        """Number of training samples."""
        return self.data.size("train")

    @property
    def held_out(self) -> int:
        """Number of held-out samples."""
        return self.data.size("held_out")

    def steps(self, batch_size: int, samples: int | None = None) -> int:
        """Return the steps of one epoch over all training samples, or over ``samples`` of them."""
        return self.data.steps("train", batch_size, samples=samples, distributed=self.distributed)

    def held_out_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first held-out images [n, C, H, W], at most ``count``, and their labels [n], on every rank."""
        images: list[Tensor] = []
        labels: list[Tensor] = []
        missing = min(count, self.held_out)
        if missing < 1:
            raise ValueError(f"data {self.data.name!r}: nothing is held out")
        for some, classes in self.data.batches("held_out", self.batch_size, complete=True):
            images.append(self.placement.images(some[:missing]))
            labels.append(self.placement.labels(classes[:missing]))
            missing -= len(labels[-1])
            if missing == 0:
                break
        return torch.cat(images), torch.cat(labels)

    def accuracy(self, network: Callable[[Tensor], Tensor]) -> float:
        """Return the top-1 accuracy in [0, 1] on the held-out part of the training set, over all ranks."""
        return self._evaluate(network)["accuracy"]

    def loss(self, network: Callable[[Tensor], Tensor]) -> float:
        """Return the mean cross-entropy on the held-out part of the training set, over all ranks."""
        return self._evaluate(network)["loss"]

    def _evaluate(self, network: Callable[[Tensor], Tensor]) -> Evaluation:
        return evaluate(
            network,
            self.data,
            "held_out",
            batch_size=self.batch_size,
            placement=self.placement,
            distributed=self.distributed,
        )
