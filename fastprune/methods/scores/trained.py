"""What methods that train the weights, and rank the channels by what has become of them, share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from fastprune.methods.contract import Task
from fastprune.methods.scores.ranking import ScoreMethod
from fastprune.options import option
from fastprune.planning.fitting import fit
from fastprune.training.options import WeightOptions
from fastprune.training.phases import Metrics, Phase
from fastprune.training.weight_training import WeightTraining


@dataclass(frozen=True)
class TrainedConfig(WeightOptions):
    """The training, which channels may go, and how they are ranked after it."""

    groups: Literal["all", "interior"] = option(
        "all", "which channels may go: all, or only those inside blocks (no residual stream, stem or classifier input)"
    )
    ranking: Literal["local", "global"] = option(
        "global", "local: the same part of every group stays; global: the channels of the whole network compete"
    )


class TrainedMethod(ScoreMethod):
    """A method that trains the network in one phase, with something of its own done to gradients or weights.

    Subclasses give ``scores``, and any of ``before_update``, ``after_update`` and ``after_epoch``.
    """

    needs_data = True
    trains_weights = True
    Config: ClassVar[type[Any]] = TrainedConfig
    config: Any

    def setup(self, task: Task) -> None:
        """Make the optimiser.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
            ValueError: for a model without parameters that require gradients.
        """
        assert task.data is not None
        self.may_go = self.prunable(task)
        # Raises before a training that cannot succeed.
        fit(task.graph, task.budget, torch.zeros(task.graph.num_units), prunable=self.may_go, limits=task.limits)
        self.training = WeightTraining(
            task.model,
            self.config,
            steps_per_epoch=task.data.steps(self.config.batch_size),
            device=task.device,
            peers=task.distributed,
        )

    def phases(self, task: Task) -> Iterator[Phase]:
        """One phase: the training."""

        def step(images: torch.Tensor, labels: torch.Tensor) -> Metrics:
            metrics = self.training.gradients(images, labels)
            self.before_update(task)
            rate = self.training.learning_rate
            self.training.update()
            self.after_update(task, rate)
            return metrics

        def end_epoch(epoch: int) -> Metrics:
            return self.end_epoch(task, epoch)

        config = self.config
        task.model.train()
        yield Phase(
            "weights", config.epochs, step, batch_size=config.batch_size, augment=config.augment, end_epoch=end_epoch
        )
        self.training.share_buffers()
        task.model.eval()

    def before_update(self, task: Task) -> None:
        """Change the gradients of a step, if there is anything to change."""

    def after_update(self, task: Task, rate: float) -> None:
        """Change the weights after a step, which had the learning rate ``rate``."""

    def after_epoch(self, task: Task) -> Metrics:
        """Change the weights after an epoch; the metrics to log."""
        return {}

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """What is done and logged after an epoch, counted from 0."""
        assert task.data is not None
        metrics, every = dict(self.after_epoch(task)), self.config.evaluate_every
        due = every and ((epoch + 1) % every == 0 or epoch + 1 == self.config.epochs)
        if due and task.data.held_out:
            self.training.share_buffers()
            metrics["held_out_accuracy"] = task.data.accuracy(task.model)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state; the weights are saved by themselves."""
        return self.training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.training.load_state_dict(state)
