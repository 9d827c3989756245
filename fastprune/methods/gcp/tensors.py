"""The tensors of a model that GCP changes besides the scales and shifts of batch norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastprune.host.distributed import Distributed


class ModelTensors:
    """Linear layers, biases and batch statistics of a model.

    Args:
        model: the model.

    Attributes:
        linear: θ, the parameters of linear layers, which train.
        frozen: all other parameters, which do not.
        shifts: the biases among these, which folding changes.
        statistics: running means and variances of batch norms.
    """

    def __init__(self, model: nn.Module) -> None:
        self.linear = [
            parameter
            for module in model.modules()
            if isinstance(module, nn.Linear)
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        ]
        self.statistics = [
            buffer
            for norm in model.modules()
            if isinstance(norm, _BatchNorm)
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None
        ]
        trained = {id(parameter) for parameter in self.linear}
        others = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in trained]
        self.frozen = [parameter for _, parameter in others]
        self.shifts = [parameter for name, parameter in others if name.endswith("bias")]

    def copy(self) -> list[Tensor]:
        """Copy the values of all tensors that change."""
        return [tensor.detach().clone() for tensor in (*self.linear, *self.shifts, *self.statistics)]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Write back what ``copy`` returned."""
        for tensor, value in zip((*self.linear, *self.shifts, *self.statistics), values, strict=True):
            tensor.copy_(value)

    @torch.no_grad()
    def share_statistics(self, peers: Distributed) -> None:
        """Replace the statistics by their mean over all ranks, which saw different samples."""
        if peers.world_size > 1 and self.statistics:
            flat = peers.mean_(torch.cat([buffer.float() for buffer in self.statistics]))
            for buffer, part in zip(self.statistics, flat.split([len(b) for b in self.statistics]), strict=True):
                buffer.copy_(part)
