"""The baselines that every paper compares with: uniform, random, and the norms of filters."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.methods.contract import Task
from fastprune.methods.scores.filters import unit_norms
from fastprune.methods.scores.ranking import KeepConfig, ScoreMethod


class Uniform(ScoreMethod):
    """Keep the same part of every group, whatever the weights are: the first channels of each.

    The order of a trained network's channels means nothing, so the first ones are as good a sample as any. They are
    taken because the networks of two budgets are then nested, and every kept set is a prefix, a view without a copy.
    """

    name = "uniform"
    paper = ""
    Config: ClassVar[type[Any]] = KeepConfig

    def scores(self, task: Task) -> Tensor:
        """Higher for channels that come first."""
        return -torch.arange(task.graph.num_units, dtype=torch.float64)


class Random(ScoreMethod):
    """Keep random channels, drawn by the run's seed."""

    name = "random"
    paper = ""

    def scores(self, task: Task) -> Tensor:
        """Uniform in [0, 1)."""
        # Seeded here, so that the plan does not depend on who drew from task.rng before.
        generator = torch.Generator().manual_seed(task.seed)
        return torch.rand(task.graph.num_units, generator=generator, dtype=torch.float64)


class L1(ScoreMethod):
    """Keep the channels whose filters have the largest sum of absolute weights.

    A channel that several layers make (a residual stream) counts the filters of all of them.
    """

    name = "l1"
    paper = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"

    def scores(self, task: Task) -> Tensor:
        """‖filters‖₁ of each unit (§3.1 of the paper)."""
        return unit_norms(task.graph, task.model, p=1)


class L2(ScoreMethod):
    """Keep the channels whose filters have the largest Euclidean norm, over all layers that make the channel."""

    name = "l2"
    paper = "He et al., Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018"

    def scores(self, task: Task) -> Tensor:
        """‖filters‖₂ of each unit."""
        return unit_norms(task.graph, task.model, p=2)
