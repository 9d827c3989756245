"""Fisher pruning (Theis et al., 2018, §2.2; for channels that several layers read, Liu et al., ICML 2021).

    L_u = ½ mean over samples of (∂L_n/∂g_u)²,    ∂L_n/∂g_u = Σ over readers and positions of x_u ∂L_n/∂x_u

g_u is a gate at everything that reads the channel: the loss that its closing costs, by the diagonal of the Fisher
matrix, as in Optimal Brain Damage (LeCun et al., NIPS 1989). It compares across layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.data.nests import count_samples
from fastprune.methods.contract import Task
from fastprune.methods.criteria.calibrated import CalibratedConfig, CalibratedMethod, add_to_units
from fastprune.methods.criteria.readings import feature_maps, true_readers
from fastprune.methods.scores.ranking import RANKINGS, Ranking
from fastprune.networks.observed import ObservedNetwork
from fastprune.options import option


@dataclass(frozen=True)
class FisherConfig(CalibratedConfig):
    """Options of Fisher pruning."""

    ranking: Ranking = option("knapsack", RANKINGS)


class Fisher(CalibratedMethod):
    """Remove the channels whose loss, by the diagonal of the Fisher matrix, is smallest for what they cost."""

    name = "fisher"
    paper = "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018"
    comparable = True
    Config: ClassVar[type[Any]] = FisherConfig
    config: FisherConfig

    def setup(self, task: Task) -> None:
        """Observe the readers of prunable channels."""
        super().setup(task)
        self.network = ObservedNetwork(task.graph, task.model, true_readers(task.graph))

    def calibrate(self, task: Task, inputs: Any, targets: Any) -> None:
        """Sum the squared gradients of the gates over the samples."""
        with torch.enable_grad():
            output, target = task.objective.run(self.network, inputs, targets)
            loss = task.objective.compute(output, target)
            gradients = self.network.input_gradients(loss)
        samples = count_samples(inputs)
        slopes = torch.zeros(samples, task.graph.num_units, dtype=torch.float64)
        for reading, gradient in zip(self.network.readings, gradients, strict=True):
            products = feature_maps(reading, reading.x.detach() * gradient)
            own = products.reshape(samples, -1, *products.shape[1:]).movedim(2, 1).flatten(2).sum(2)  # [N, C]
            add_to_units(slopes, reading.layer.in_units, own * samples)  # the loss is a mean over the samples
        self.add("squares", slopes.square().sum(0))
        self.add("samples", torch.tensor(float(samples), dtype=torch.float64))

    def scores(self, task: Task) -> Tensor:
        """Return the loss of each unit."""
        totals = self.reduced(task)
        return totals["squares"] / totals["samples"] / 2
