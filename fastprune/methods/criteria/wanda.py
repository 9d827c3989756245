"""Wanda (Sun et al., ICLR 2024), for channels: weights times the norm of what they are multiplied with.

    I_u = Σ over readers Σ_w |w| ‖x_u‖₂            w: the weights that read the channel, ‖·‖₂ over samples and positions

The norm is a root mean square, so that the size of a map does not count. (Eq. 1 of the paper, summed over a column.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprune.graph import Layer
from fastprune.graph.model_state import state_of
from fastprune.methods.contract import Task
from fastprune.methods.criteria.calibrated import CalibratedMethod, add_to_units
from fastprune.methods.criteria.readings import feature_maps, true_readers
from fastprune.networks.observed import ObservedNetwork


class Wanda(CalibratedMethod):
    """Keep the channels that are read with the largest weights, in proportion to their strength."""

    name = "wanda"
    paper = "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024"

    def setup(self, task: Task) -> None:
        """Observe the readers of prunable channels."""
        super().setup(task)
        self.network = ObservedNetwork(task.graph, task.model, true_readers(task.graph))

    @torch.no_grad()
    def calibrate(self, task: Task, inputs: Any, targets: Any) -> None:
        """Sum the squares that every layer reads."""
        task.objective.run(self.network, inputs, targets)
        for reading in self.network.readings:
            maps = feature_maps(reading).double()
            maps = maps.reshape(*maps.shape[:2], -1)
            self.add(f"{reading.layer.node}/squares", maps.square().mean(2).sum(0))
            self.add(f"{reading.layer.node}/samples", torch.tensor(float(len(maps)), dtype=torch.float64))

    def scores(self, task: Task) -> Tensor:
        """Return the importance of each unit."""
        totals, scores = self.reduced(task), torch.zeros(task.graph.num_units, dtype=torch.float64)
        weights = state_of(task.model)
        for layer in true_readers(task.graph):
            strength = (totals[f"{layer.node}/squares"] / totals[f"{layer.node}/samples"]).sqrt()
            columns = column_sums(layer, weights[layer.weight].detach().double())
            add_to_units(scores, layer.in_units, strength * columns)
        return scores


def column_sums(layer: Layer, weight: Tensor) -> Tensor:
    """Return Σ |w| over the weights that read each input channel of a layer, [C]."""
    channels = len(layer.in_units)
    if "transpose" in layer.kind:  # [C, O / groups, ...]
        return weight.abs().flatten(1).sum(1)
    groups = channels // weight.shape[1]
    return weight.abs().reshape(groups, len(weight) // groups, weight.shape[1], -1).sum((1, 3)).flatten()
