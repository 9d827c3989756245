"""The base class of methods whose sub-networks share the weights of one network, trained in several passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastprune.methods.contract import Method, Task, is_evaluation_due
from fastprune.methods.sp.supernet import SuperNet
from fastprune.options import option, settle
from fastprune.training.objective import main_scores, split
from fastprune.training.options import WeightOptions
from fastprune.training.phases import Metrics, Phase
from fastprune.training.schedule import SCHEDULES
from fastprune.training.weight_training import WeightTraining

if TYPE_CHECKING:
    from typing_extensions import Self

MILESTONES = (0.2, 0.4, 0.6, 0.8)  # SP's paper, for CIFAR-10


@dataclass(frozen=True)
class WeightSharingConfig(WeightOptions):
    """Options of the training, and of the search after it.

    The defaults are those of SP's paper for CIFAR-10, except for the schedule: drops at fifths of a short training
    leave most of it at rates that train nothing.
    """

    epochs: int = option(50, "passes over the training set; below 10, sub-networks are hardly trained", minimum=1)
    batch_size: int = option(512, "samples per step over all processes together", minimum=1)
    lr: float = option(0.025, "largest learning rate", minimum=0.0)
    weight_decay: float = option(3e-4, "L2 penalty of SGD", minimum=0.0)
    schedule: str = option(
        "auto",
        "shape of the learning rate over the epochs; auto = cosine, or milestones where these are given",
        choices=("auto", *SCHEDULES),
    )
    milestones: tuple[float, ...] = option(
        (), "epochs of the drops, or fractions of all epochs if below 1; none = fifths, if there are drops", minimum=0.0
    )
    images: int = option(2048, "held-out images, in one batch, on which sub-networks are compared", minimum=2)

    def resolve(self) -> Self:
        """Return these options with what ``auto`` and no milestones stand for.

        Not in ``__post_init__``: command lines give every option, the defaults of an instance for those not typed.
        """
        settled = settle(self, {"schedule": "milestones" if self.milestones else "cosine"})
        return replace(settled, milestones=self.milestones or MILESTONES)


class WeightSharing(Method):
    """A method that trains a network together with its sub-networks and compares these on held-out images.

    Subclasses set ``prunable_units``, ``net`` and ``training`` in ``setup``, and implement ``learn``.
    """

    needs_data = True
    trains_weights = True
    Config: ClassVar[type[Any]] = WeightSharingConfig
    config: Any
    prunable_units: Tensor
    net: SuperNet
    training: WeightTraining

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.config = self.config.resolve()

    @abstractmethod
    def learn(self, task: Task, features: Sequence[Tensor], scores: Any) -> Metrics:
        """Run forward and backward passes of sub-networks.

        Args:
            task: the task.
            features: the images, then the full network's features at the ends of the stages of ``net``, detached.
            scores: the outputs of the full network, detached: class scores [N, classes], or what the loss takes.

        Returns:
            The metrics to log.
        """

    def check_task(self, task: Task) -> None:
        """Refuse a task that cannot succeed, before the training.

        Raises:
            BudgetError: if the budget is out of reach with the units ``prunable_units``; says what is in reach.
            ValueError: if nothing is held out, or batches are no pairs of images and targets.
        """
        if task.objective.forward is not None or len(task.graph.traced.inputs.tensors) > 1:
            raise ValueError(
                f"{self.name}: features of stages are those of one batch of images; networks of several inputs and "
                "forward= are not supported; choose another method"
            )
        assert task.data is not None
        if task.data.held_out < 2:
            raise ValueError(
                f"{self.name}: sub-networks are compared on held-out images, but nothing is held out; hold some out"
            )
        task.require_feasible(self.prunable_units)

    def make_training(self, task: Task, trained: nn.Module) -> WeightTraining:
        """Create the training of the parameters of ``trained``."""
        assert task.data is not None
        return WeightTraining(
            trained,
            self.config,
            steps_per_epoch=task.data.steps(self.config.batch_size),
            device=task.device,
            peers=task.distributed,
            several_passes=True,
            objective=task.objective,
        )

    def train(self, task: Task, name: str) -> Iterator[Phase]:
        """Yield the phase of the training, with the model in train mode."""
        config = self.config
        task.model.train()
        yield Phase(
            name,
            config.epochs,
            lambda inputs, targets: self.step(task, inputs, targets),
            batch_size=config.batch_size,
            augment=config.augment,
            end_epoch=lambda epoch: self.end_epoch(task, epoch),
        )
        task.model.eval()

    def step(self, task: Task, inputs: Any, targets: Any) -> Metrics:
        """Run the full network, then sub-networks; update the weights once with the gradients of all."""
        images, targets = split(inputs, targets)
        self.training.optimizer.zero_grad(set_to_none=True)
        features, outputs = self.net.run_full(images)
        loss, metrics = task.objective.measure(outputs, targets, label_smoothing=self.config.label_smoothing)
        backward(loss)
        scores = main_scores(outputs).detach() if task.objective.classifies else outputs
        learned = self.learn(task, features, scores)
        self.training.average_gradients()
        self.training.update()
        return {"loss": loss.detach(), **metrics, **learned}

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """Give all ranks the same statistics; return the held-out accuracy of the full network if it is due."""
        assert task.data is not None
        self.training.share_buffers()
        if is_evaluation_due(epoch, self.config.epochs, self.config.evaluate_every):
            return {f"held_out_{task.objective.measure_name}": task.measure(task.model)}
        return {}


def backward(loss: Tensor) -> None:
    """Run the backward pass outside of autocast; gradients take the precision of their forward."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()
