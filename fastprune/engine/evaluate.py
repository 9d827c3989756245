"""Accuracy and loss on one part of the data, exact over any number of processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.data.batches import Split
from fastprune.data.data import Data, SourceData
from fastprune.data.nests import count_samples
from fastprune.engine.device import Placement
from fastprune.graph.model_state import in_eval_mode
from fastprune.host import progress
from fastprune.host.distributed import Distributed
from fastprune.training.objective import Network, Objective, class_labels, count_top5, has_top5, main_scores


class Accuracy(TypedDict, total=False):
    """The part of an evaluation that only class scores have."""

    accuracy: float
    """Top-1, in [0, 1]."""
    top5: float
    """Part of the samples whose class is among the five highest scores; of networks with 10 classes or more."""


class Evaluation(Accuracy):
    """Result of ``evaluate``."""

    loss: float
    """Mean cross-entropy in nats, or mean of the objective's own loss."""
    samples: int
    """Number of samples seen, over all ranks."""


def evaluate(
    network: Network,
    data: Data,
    split: Split = "test",
    *,
    batch_size: int = 256,
    placement: Placement | None = None,
    distributed: Distributed | None = None,
    objective: Objective | None = None,
) -> Evaluation:
    """Measure ``network`` on every sample of ``split`` once.

    Args:
        network: maps images [N, C, H, W] to scores [N, num_classes], or what else the objective takes. A module must be
            on the placement's device, and runs in eval mode.
        data: the data set.
        split: the part to measure on.
        batch_size: samples per step over all ranks together; changes the result by rounding only.
        placement: device, precision and layout of the computation; None = the CPU in float32.
        distributed: this process among its peers; all must call.
        objective: the loss that is measured; None = cross-entropy.

    Returns:
        Accuracy (of class scores; top-5, too, of 10 classes or more), loss and number of samples, the same on every
        rank.

    Raises:
        ValueError: if the split is empty.
    """
    peers, place = distributed or Distributed(), placement or Placement()
    aim = objective or Objective()
    totals = torch.zeros(5, dtype=torch.float64, device=place.device)  # as ``sums`` returns them
    batches = data.batches(split, max(batch_size, peers.world_size), complete=True, distributed=peers)
    modules = [network] if isinstance(network, nn.Module) else []
    work = progress.begin("evaluating", count_cheaply(data, split), wanted=peers.is_main)
    with in_eval_mode(*modules), torch.no_grad(), place.autocast(), work:
        for inputs, targets in batches:
            output, target = aim.run(network, place.images(inputs), place.labels(targets))
            samples = count_samples((inputs, targets))
            totals += sums(aim, output, target, samples=samples)
            work.advance(samples * peers.world_size)
    correct, loss, samples, correct5, samples5 = peers.sum_(totals).tolist()
    if not samples:
        raise ValueError(f"data {data.name!r} has no {split} samples to evaluate on")
    accuracy: Accuracy = {"accuracy": correct / samples} if aim.classifies else {}
    if samples5:
        accuracy["top5"] = correct5 / samples5
    return {**accuracy, "loss": loss / samples, "samples": int(samples)}


def sums(objective: Objective, output: Any, target: Any, *, samples: int) -> Tensor:
    """Return the sums over a batch: right samples, loss, samples; right samples of top-5, samples with one; float64."""
    top5 = [torch.zeros((), dtype=torch.float64)] * 2
    if objective.classifies and class_labels(output, target).dim() == 1:
        scores, labels = main_scores(output).float(), class_labels(output, target)
        right, loss = (scores.argmax(1) == labels).sum(), F.cross_entropy(scores, labels, reduction="sum")
        if has_top5(scores):
            top5 = [count_top5(scores, labels), torch.full_like(right, samples)]
    else:
        loss, metrics = objective.measure(output, target)
        right, loss = metrics.get("accuracy", torch.zeros_like(loss)).double() * samples, loss.double() * samples
    values = [right, loss, torch.full_like(loss, samples, dtype=torch.float64), *top5]
    return torch.stack([value.to(loss.device, torch.float64) for value in values])


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
        objective: the loss that is measured.
    """

    data: Data
    placement: Placement
    distributed: Distributed
    batch_size: int = 256
    objective: Objective = field(default_factory=Objective)

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
        # Of balanced data, as many of each class; otherwise the first ones.
        samples = missing if self.data.balanced else None
        for some, classes in self.data.batches("held_out", self.batch_size, complete=True, samples=samples):
            images.append(self.placement.images(some[:missing]))
            labels.append(self.placement.labels(classes[:missing]))
            missing -= len(labels[-1])
            if missing == 0:
                break
        return torch.cat(images), torch.cat(labels)

    def accuracy(self, network: Network) -> float:
        """Return the top-1 accuracy in [0, 1] on the held-out part of the training set, over all ranks."""
        self.objective.require_classification("accuracy")
        return self._evaluate(network)["accuracy"]

    def loss(self, network: Network) -> float:
        """Return the mean loss on the held-out part of the training set, over all ranks."""
        return self._evaluate(network)["loss"]

    def _evaluate(self, network: Network) -> Evaluation:
        return evaluate(
            network,
            self.data,
            "held_out",
            batch_size=self.batch_size,
            placement=self.placement,
            distributed=self.distributed,
            objective=self.objective,
        )
