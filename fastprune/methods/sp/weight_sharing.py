"""What methods have in common whose sub-networks share the weights of one network: its training, in several passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastprune.methods.contract import Method, Task
from fastprune.methods.sp.supernet import SuperNet
from fastprune.options import option
from fastprune.planning.fitting import fit
from fastprune.training.options import WeightOptions
from fastprune.training.phases import Metrics, Phase
from fastprune.training.weight_training import WeightTraining, classification_loss


@dataclass(frozen=True)
class WeightSharingConfig(WeightOptions):
    """Options of the training, by default those of SP's paper for CIFAR-10, and of the search after it."""

    epochs: int = option(50, "passes over the training set", minimum=1)
    batch_size: int = option(512, "samples per step over all processes together", minimum=1)
    lr: float = option(0.025, "largest learning rate", minimum=0.0)
    weight_decay: float = option(3e-4, "L2 penalty of SGD", minimum=0.0)
    milestones: tuple[float, ...] = option(
        (0.2, 0.4, 0.6, 0.8), "epochs of the drops, or fractions of all epochs if below 1", minimum=0.0
    )
    images: int = option(2048, "held-out images to compare sub-networks on, in one batch", minimum=2)


class WeightSharing(Method):
    """A method that trains a network together with its sub-networks, and compares these on held-out images.

    Subclasses set ``may_go``, ``net`` and ``training`` in ``setup``, and give ``learn``.
    """

    needs_data = True
    trains_weights = True
    Config: ClassVar[type[Any]] = WeightSharingConfig
    config: Any
    may_go: Tensor
    net: SuperNet
    training: WeightTraining

    @abstractmethod
    def learn(self, task: Task, features: Sequence[Tensor], scores: Tensor) -> Metrics:
        """Backward passes of sub-networks.

        Args:
            task: as everywhere.
            features: the images, then the full network's features at the ends of the stages of ``net``, detached.
            scores: of the full network, detached, [N, classes].

        Returns:
            The metrics to log.
        """

    def require(self, task: Task) -> None:
        """Refuse what could not succeed, before the training.

        Raises:
            BudgetError: if the budget is out of reach with the units ``may_go``; says what is in reach.
            ValueError: if nothing is held out.
        """
        assert task.data is not None
        if task.data.held_out < 2:
            raise ValueError(f"{self.name}: sub-networks are compared on held-out images, but nothing is held out")
        fit(task.graph, task.budget, torch.zeros(task.graph.num_units), prunable=self.may_go, limits=task.limits)

    def make_training(self, task: Task, trained: nn.Module) -> WeightTraining:
        """The training of the parameters of ``trained``."""
        assert task.data is not None
        return WeightTraining(
            trained,
            self.config,
            steps_per_epoch=task.data.steps(self.config.batch_size),
            device=task.device,
            peers=task.distributed,
            several_passes=True,
        )

    def train(self, task: Task, name: str) -> Iterator[Phase]:
        """The phase of the training; the model is in train mode for its duration."""
        config = self.config
        task.model.train()
        yield Phase(
            name,
            config.epochs,
            lambda images, labels: self.step(task, images, labels),
            batch_size=config.batch_size,
            augment=config.augment,
            end_epoch=lambda epoch: self.end_epoch(task, epoch),
        )
        task.model.eval()

    def step(self, task: Task, images: Tensor, labels: Tensor) -> Metrics:
        """The full network, then sub-networks, and one update with the gradients of all."""
        self.training.optimizer.zero_grad(set_to_none=True)
        features, outputs = self.net.full(images)
        loss, scores = classification_loss(outputs, labels, self.config.label_smoothing)
        backward(loss)
        metrics = self.learn(task, features, scores.detach())
        self.training.average_gradients()
        self.training.update()
        accuracy = (scores.argmax(1) == labels).float().mean()
        return {"loss": loss.detach(), "accuracy": accuracy, **metrics}

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """Give all ranks the same statistics; the held-out accuracy of the full network, when due."""
        assert task.data is not None
        self.training.share_buffers()
        every = self.config.evaluate_every
        if every and ((epoch + 1) % every == 0 or epoch + 1 == self.config.epochs):
            return {"held_out_accuracy": task.data.accuracy(task.model)}
        return {}


def backward(loss: Tensor) -> None:
    """Outside of autocast, as each gradient takes the precision of its forward."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()
