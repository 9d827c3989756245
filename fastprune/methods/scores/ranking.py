"""Methods that give every channel a score and keep the best: override one function, get budgets, options and groups."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.graph.interior import gated_units
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Method, Task
from fastprune.options import option
from fastprune.planning.fitting import fit


@dataclass(frozen=True)
class KeepConfig:
    """Which units a score-based method may prune."""

    groups: Literal["all", "interior"] = option(
        "all", "which channels may go: all, or only those inside blocks (no residual stream, stem or classifier input)"
    )


@dataclass(frozen=True)
class RankingConfig(KeepConfig):
    """The options of a method whose scores can be compared within a group or over the whole network."""

    ranking: Literal["local", "global"] = option(
        "local",
        "local: the same part of every group stays; global: the channels of the whole network compete, "
        "each score divided by the mean of its group",
    )


class ScoreMethod(Method):
    """A method that only needs ``scores``: the importance of every unit.

    The scores become a plan by one of two rankings:

    * "local": a unit's priority is its rank within its group, relative to the group's size, so that every group keeps
      the same part (to within the rounding to whole channels that fills the budget);
    * "global": scores are divided by the mean of their absolute values in the group, so that groups of other fan-in and
      scale are comparable, and compete over the whole network.

    A class whose scores mean the same everywhere says ``comparable = True``; then they are not divided.

    Either way units are kept in order of priority until the budget is full: met from below, to within 1 % of the full
    network's cost where single channels are small enough. The run's ``Limits`` hold in both.

    Example:
        >>> class FirstChannels(ScoreMethod):
        ...     name = "first"
        ...     def scores(self, task):
        ...         return -torch.arange(task.graph.num_units)
    """

    Config: ClassVar[type[Any]] = RankingConfig
    comparable: ClassVar[bool] = False
    config: Any

    @abstractmethod
    def scores(self, task: Task) -> Tensor:
        """The importance of each unit: [U], finite, higher = stays longer; the same on every rank."""

    def prunable(self, task: Task) -> Tensor:
        """The units that may go, bool [U]: those of the option ``groups``."""
        return gated_units(task.graph, self.config.groups)

    def plan(self, task: Task) -> PruningPlan:
        """Keep the units of highest priority that the budget allows.

        Raises:
            ValueError: if the scores have another shape, or are not finite.
            BudgetError: if the budget is out of reach under these options and limits; says what is in reach.
        """
        graph = task.graph
        scores = self.scores(task).detach().to("cpu", torch.float64)
        if scores.shape != (graph.num_units,):
            raise ValueError(
                f"{self.name}: scores for {graph.num_units} units are needed, got shape {tuple(scores.shape)}"
            )
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"{self.name}: scores must be finite; are the model's weights?")
        # A Config without the field (Uniform) ranks within groups.
        priority = scores if self.comparable else across_groups(graph, scores)
        if getattr(self.config, "ranking", "local") == "local":
            priority = within_groups(graph, scores)
        return graph.plan(fit(graph, task.budget, priority, prunable=self.prunable(task), limits=task.limits))


def within_groups(graph: ChannelGraph, scores: Tensor) -> Tensor:
    """Each unit's rank in its group as a priority in (-1, 0): equal thresholds keep equal parts of all groups.

    Args:
        graph: the network.
        scores: [U]; ties go to the lower index.

    Returns:
        ``-(rank + ½) / size`` with rank 0 for the group's best unit, float64 [U].
    """
    priority = torch.empty(graph.num_units, dtype=torch.float64)
    for group in graph.groups:
        priority[group.units] = -(rank_of(scores[group.units]).double() + 0.5) / group.size
    return priority


def across_groups(graph: ChannelGraph, scores: Tensor) -> Tensor:
    """Scores divided by the mean absolute score of their group, float64 [U]; a group of zeros stays zero."""
    groups = graph.group_of_unit
    sums = torch.zeros(len(graph.groups), dtype=torch.float64).index_add(0, groups, scores.double().abs())
    means = sums / graph.offsets.diff()
    return scores.double() / torch.where(means > 0, means, 1.0)[groups]


def rank_of(scores: Tensor) -> Tensor:
    """The place of each score, 0 for the highest; ties go to the lower index."""
    order = scores.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
