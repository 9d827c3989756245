"""The base class of criteria that measure the feature maps of each channel."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fastprune.methods.contract import Task
from fastprune.methods.criteria.calibrated import CalibratedMethod
from fastprune.methods.criteria.readings import channel_totals, true_readers
from fastprune.networks.observed import ObservedNetwork


class FeatureMethod(CalibratedMethod):
    """A score that is the mean of a measure of a channel's feature maps, over samples and readers."""

    def setup(self, task: Task) -> None:
        """Observe the readers of prunable channels."""
        super().setup(task)
        self.network = ObservedNetwork(task.graph, task.model, true_readers(task.graph))

    @abstractmethod
    def measure(self, maps: Tensor) -> Tensor:
        """Return the sum over the samples of a measure of each channel, [C], of feature maps [N, C, ...]."""

    @torch.no_grad()
    def calibrate(self, task: Task, inputs: Any, targets: Any) -> None:
        """Measure the feature maps of a batch."""
        task.objective.run(self.network, inputs, targets)
        self.add("maps", channel_totals(self.network.readings, self.measure, task.graph.num_units))

    def scores(self, task: Task) -> Tensor:
        """Return the mean of each unit; 0 for units that no layer reads."""
        total, count = self.reduced(task)["maps"]
        means: Tensor = total / count.clamp(min=1)
        return means
