"""Common baselines: uniform widths, random channels, and the norms of filters."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.methods.contract import Task
from fastprune.methods.scores.filters import unit_norms
from fastprune.methods.scores.ranking import KeepConfig, ScoreMethod


class Uniform(ScoreMethod):
    """Keep the same fraction of every group, its first channels, whatever their weights.

    The order of a trained network's channels means nothing, so the first ones are as good a sample as any. With them
    the networks of two budgets are nested, and every kept set is a prefix, a view without a copy.
    """

    name = "uniform"
    paper = ""
    Config: ClassVar[type[Any]] = KeepConfig

    def scores(self, task: Task) -> Tensor:
        """Return scores that fall with the index."""
        return -torch.arange(task.graph.num_units, dtype=torch.float64)


class Random(ScoreMethod):
    """Keep random channels, drawn with the seed of the run."""

    name = "random"
    paper = ""

    def scores(self, task: Task) -> Tensor:
        """Draw scores uniformly from [0, 1)."""
        # Its own generator: the plan must not depend on earlier draws from task.rng.
        generator = torch.Generator().manual_seed(task.seed)
        return torch.rand(task.graph.num_units, generator=generator, dtype=torch.float64)


class L1(ScoreMethod):
    """Keep the channels whose filters have the largest sum of absolute weights.

    For a channel that several layers make (a residual stream), the filters of all of them count.
    """

    name = "l1"
    paper = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"

    def scores(self, task: Task) -> Tensor:
        """Return ‖filters‖₁ of each unit (§3.1 of the paper)."""
        return unit_norms(task.graph, task.model, p=1)


class L2(ScoreMethod):
    """Keep the channels whose filters have the largest Euclidean norm, over all layers that make the channel."""

    name = "l2"
    paper = "He et al., Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018"

    def scores(self, task: Task) -> Tensor:
        """Return ‖filters‖₂ of each unit."""
        return unit_norms(task.graph, task.model, p=2)
