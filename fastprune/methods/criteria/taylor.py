"""First-order Taylor expansion (Molchanov et al., CVPR 2019; for groups as in DepGraph, Fang et al., CVPR 2023).

    I_u = mean over the tensors of the unit of Σ_w |w ∂L/∂w|            L: the mean loss of the calibration samples

With ``signed``: |Σ_w w ∂L/∂w|, the change of the loss to first order if all weights of the unit become 0 together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.data.nests import count_samples
from fastprune.methods.contract import Task
from fastprune.methods.criteria.calibrated import CalibratedConfig, CalibratedMethod
from fastprune.methods.criteria.unit_values import FILTERS, GroupConfig, is_bias, unit_values
from fastprune.options import option


@dataclass(frozen=True)
class TaylorConfig(GroupConfig, CalibratedConfig):
    """Options of the Taylor expansion."""

    signed: bool = option(False, "add up w ∂L/∂w with their signs within each tensor")


class Taylor(CalibratedMethod):
    """Keep the channels whose weights the loss depends on most, to first order."""

    name = "taylor"
    paper = "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019"
    Config: ClassVar[type[Any]] = TaylorConfig
    config: TaylorConfig

    def calibrate(self, task: Task, inputs: Any, targets: Any) -> None:
        """Sum the gradients of the samples' losses."""
        wanted = {piece.tensor for piece in task.graph.slices if piece.role in FILTERS and not is_bias(piece.tensor)}
        weights = {name: w for name, w in task.model.named_parameters(remove_duplicate=False) if name in wanted}
        frozen = [w for w in weights.values() if not w.requires_grad]
        for w in frozen:
            w.requires_grad_(True)
        try:
            with torch.enable_grad():
                output, target = task.objective.run(task.model, inputs, targets)
                loss = task.objective.compute(output, target)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        finally:
            for w in frozen:
                w.requires_grad_(False)
        samples = count_samples(inputs)
        self.add("samples", torch.tensor(float(samples)))
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                self.add(f"of {name}", gradient * samples)

    def scores(self, task: Task) -> Tensor:
        """Return the importance of each unit."""
        totals, signed = self.reduced(task), self.config.signed

        def change(name: str, w: Tensor) -> Tensor | None:
            if f"of {name}" not in totals:
                return None
            product = w * totals[f"of {name}"] / totals["samples"]
            return product if signed else product.abs()

        return unit_values(task.graph, task.model, change, reduction=self.config.reduction, absolute=signed)
