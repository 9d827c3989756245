"""Methods that give every channel a score and keep the best: a subclass only computes the scores."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.graph.interior import GROUPS, gated_units
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Method, Task
from fastprune.options import option
from fastprune.planning.allocation import allocate
from fastprune.planning.fitting import fit

Ranking = Literal["local", "global", "isomorphic", "knapsack"]

RANKINGS = (
    "local: keep the same fraction of every group; global: all channels of the network compete, each score divided by "
    "the mean of its group; isomorphic: groups of the same layers compete; knapsack: scores are losses, least in sum"
)
"""What the option ``ranking`` of methods means."""


@dataclass(frozen=True)
class KeepConfig:
    """The option of a score-based method that selects the prunable channels."""

    groups: Literal["all", "interior", "auto"] = option("all", GROUPS)


@dataclass(frozen=True)
class RankingConfig(KeepConfig):
    """Options of a method whose scores are compared within a group or over the whole network."""

    ranking: Ranking = option("local", RANKINGS)


class ScoreMethod(Method):
    """A method that only needs ``scores``: the importance of every unit.

    One of two rankings turns the scores into a plan:

    * "local": a unit's priority is its rank within its group, relative to the group's size. Every group keeps the same
      fraction, up to the rounding to whole channels that fills the budget.
    * "global": scores are divided by the mean of their absolute values in the group, which makes groups of different
      fan-in and scale comparable, and all units of the network compete.

    A class whose scores have one scale in the whole network sets ``comparable = True``; then nothing is divided.

    Both rankings keep units in order of priority until the budget is full: met from below, to within 1 % of the full
    network's cost where single channels are small enough. Both respect the run's ``Limits``.

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
        """Return the importance of each unit: [U], finite, higher = kept longer; the same on every rank."""

    def prunable(self, task: Task) -> Tensor:
        """Return the prunable units, bool [U]: those of the option ``groups``."""
        return gated_units(task.graph, self.config.groups)

    def plan(self, task: Task) -> PruningPlan:
        """Keep the units of highest priority within the budget.

        Raises:
            ValueError: if the scores have another shape, or are not finite.
            BudgetError: if the budget is out of reach under these options and limits; says what is in reach.
        """
        graph = task.graph
        scores = self.scores(task).detach().to("cpu", torch.float64)
        if scores.shape != (graph.num_units,):
            raise ValueError(
                f"{self.name}: got scores of shape {tuple(scores.shape)}; scores for {graph.num_units} units are needed"
            )
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"{self.name}: scores must be finite; check the model's weights for NaN and infinity")
        ranking = getattr(self.config, "ranking", "local")  # the Config of Uniform has no option ``ranking``
        prunable = self.prunable(task)
        if ranking == "knapsack":
            return graph.plan(allocate(graph, task.budget, scores, prunable=prunable, limits=task.limits))
        if ranking == "local":
            priority = local_priority(graph, scores)
        elif ranking == "isomorphic":
            priority = isomorphic_priority(graph, scores)
        else:
            priority = scores if self.comparable else normalise_scores(graph, scores)
        return graph.plan(fit(graph, task.budget, priority, prunable=prunable, limits=task.limits))


def isomorphic_priority(graph: ChannelGraph, scores: Tensor) -> Tensor:
    """Turn ranks within groups of the same structure into priorities in (-1, 0), as in Isomorphic Pruning (§3.3).

    Two groups are isomorphic if the same kinds of layers make, pass and read their channels, whatever their widths.
    Scores compare within such a class; all classes keep the same fraction.

    Args:
        graph: the network.
        scores: scores of all units, [U]; ties go to the lower index.

    Returns:
        ``-(rank + ½) / size`` over the units of each class, float64 [U].
    """
    classes: dict[tuple[Any, ...], list[Tensor]] = {}
    kinds = {layer.weight: layer.kind for layer in graph.layers}
    for group in graph.groups:
        pieces = graph.weights_of_group(group, ("out", "in", "depthwise", "channel"))
        shape = sorted((piece.role, piece.dim, kinds.get(piece.tensor, "")) for piece in pieces)
        classes.setdefault(tuple(shape), []).append(torch.arange(group.start, group.start + group.size))
    priority = torch.empty(graph.num_units, dtype=torch.float64)
    for members in classes.values():
        units = torch.cat(members)
        priority[units] = -(ranks(scores[units]).double() + 0.5) / len(units)
    return priority


def local_priority(graph: ChannelGraph, scores: Tensor) -> Tensor:
    """Turn ranks within groups into priorities in (-1, 0): one threshold keeps the same fraction of all groups.

    Args:
        graph: the network.
        scores: scores of all units, [U]; ties go to the lower index.

    Returns:
        ``-(rank + ½) / size`` with rank 0 for the group's best unit, float64 [U].
    """
    priority = torch.empty(graph.num_units, dtype=torch.float64)
    for group in graph.groups:
        priority[group.units] = -(ranks(scores[group.units]).double() + 0.5) / group.size
    return priority


def normalise_scores(graph: ChannelGraph, scores: Tensor) -> Tensor:
    """Divide scores by the mean absolute score of their group, float64 [U]; a group of zeros stays zero."""
    groups = graph.group_of_unit
    sums = torch.zeros(len(graph.groups), dtype=torch.float64).index_add(0, groups, scores.double().abs())
    means = sums / graph.offsets.diff()
    return scores.double() / torch.where(means > 0, means, 1.0)[groups]


def ranks(scores: Tensor) -> Tensor:
    """Return the rank of each score, 0 for the highest; ties go to the lower index."""
    order = scores.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
