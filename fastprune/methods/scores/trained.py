"""The base class of methods that train the weights and then rank the channels by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastprune.graph.interior import GROUPS
from fastprune.methods.contract import Task, is_evaluation_due
from fastprune.methods.scores.ranking import ScoreMethod
from fastprune.options import option
from fastprune.training.options import WeightOptions
from fastprune.training.phases import Metrics, Phase
from fastprune.training.weight_training import WeightTraining


@dataclass(frozen=True)
class TrainedConfig(WeightOptions):
    """Options of the training, the prunable channels, and their ranking after the training."""

    groups: Literal["all", "interior", "auto"] = option("all", GROUPS)
    ranking: Literal["local", "global"] = option(
        "global", "local: keep the same fraction of every group; global: all channels of the network compete"
    )


class TrainedMethod(ScoreMethod):
    """A method that trains the network in one phase and changes gradients or weights on the way.

    Subclasses implement ``scores``, and any of ``before_update``, ``after_update`` and ``after_epoch``.
    """

    needs_data = True
    trains_weights = True
    Config: ClassVar[type[Any]] = TrainedConfig
    config: Any

    def setup(self, task: Task) -> None:
        """Create the optimiser.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
            ValueError: if no parameter of the model requires a gradient.
        """
        assert task.data is not None
        self.prunable_units = self.prunable(task)
        task.require_feasible(self.prunable_units)
        self.training = WeightTraining(
            task.model,
            self.config,
            steps_per_epoch=task.data.steps(self.config.batch_size),
            device=task.device,
            peers=task.distributed,
            objective=task.objective,
        )

    def phases(self, task: Task) -> Iterator[Phase]:
        """Yield one phase: the training."""

        def step(inputs: Any, targets: Any) -> Metrics:
            metrics = self.training.gradients(inputs, targets)
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
        """Change the gradients before a step of the optimiser."""

    def after_update(self, task: Task, rate: float) -> None:
        """Change the weights after a step of the optimiser with learning rate ``rate``."""

    def after_epoch(self, task: Task) -> Metrics:
        """Change the weights after an epoch; return the metrics to log."""
        return {}

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """Finish an epoch, counted from 0; return the metrics to log."""
        assert task.data is not None
        metrics = dict(self.after_epoch(task))
        if is_evaluation_due(epoch, self.config.epochs, self.config.evaluate_every) and task.data.held_out:
            self.training.share_buffers()
            metrics[f"held_out_{task.objective.measure_name}"] = task.measure(task.model)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state; the engine saves the weights."""
        return self.training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.training.load_state_dict(state)
