"""The base class of methods that look at some training samples before they score the channels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.methods.contract import Task
from fastprune.methods.scores.ranking import RankingConfig, ScoreMethod
from fastprune.options import option
from fastprune.training.phases import Metrics, Phase


@dataclass(frozen=True)
class CalibratedConfig(RankingConfig):
    """Options of the calibration samples, the prunable channels and their ranking."""

    images: int = option(512, "calibration samples, taken from the training set without augmentation", minimum=1)
    batch_size: int = option(64, "calibration samples per step over all processes together", minimum=1)


class CalibratedMethod(ScoreMethod):
    """A score that depends on what training samples do in the network.

    Subclasses implement ``calibrate``, which adds to ``totals``, and ``scores``, which reads ``reduced``.

    Example:
        >>> class Strength(CalibratedMethod):
        ...     name = "strength"
        ...     def calibrate(self, task, inputs, targets):
        ...         self.add("energies", task.masked.energies(inputs))
        ...     def scores(self, task):
        ...         return self.reduced(task)["energies"]
    """

    needs_data = True
    Config: ClassVar[type[Any]] = CalibratedConfig
    config: Any

    def setup(self, task: Task) -> None:
        """Start with empty totals.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
        """
        task.require_feasible(self.prunable(task))
        self.totals: dict[str, Tensor] = {}

    @abstractmethod
    def calibrate(self, task: Task, inputs: Any, targets: Any) -> None:
        """Look at one batch, with the network in eval mode; call ``add`` with sums over its samples."""

    def add(self, name: str, value: Tensor) -> None:
        """Add to a total; the totals of all ranks are added up after the last batch."""
        self.totals[name] = value.detach() + self.totals[name] if name in self.totals else value.detach().clone()

    def reduced(self, task: Task) -> dict[str, Tensor]:
        """Return the totals over all ranks."""
        return {name: task.distributed.sum_(total.clone()) for name, total in sorted(self.totals.items())}

    def phases(self, task: Task) -> Iterator[Phase]:
        """Yield one phase: the calibration."""

        def step(inputs: Any, targets: Any) -> Metrics:
            self.calibrate(task, inputs, targets)
            return {}

        task.model.eval()
        yield Phase("calibration", 1, step, samples=self.config.images, batch_size=self.config.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the totals so far."""
        return dict(self.totals)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.totals = dict(state)


def add_to_units(sums: Tensor, units: Tensor, values: Tensor) -> Tensor:
    """Add values of channels to the sums of their units, in place, and return the sums.

    Args:
        sums: one number per unit, float64 [U], or rows of them, [N, U]; on the CPU, where the order of a sum is fixed.
        units: the unit of each channel, int64 [C]; -1 = none.
        values: one number per channel, [C] or [N, C].
    """
    chosen = (units >= 0).nonzero().flatten()
    return sums.index_add_(-1, units[chosen], values.detach().to("cpu", torch.float64)[..., chosen])
