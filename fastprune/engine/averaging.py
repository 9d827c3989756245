"""A moving average of a network's weights during its training."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastprune.surgery.slicing import copy_model


class WeightAverage:
    """The exponential moving average (EMA) of a network's parameters and buffers.

    After the first step the average a is the weights w; after each later one a ← d a + (1 − d) w, with
    d = min(decay, (1 + n) / (10 + n)) for the n steps before it, so that a short training forgets where it began.
    Tensors of other kinds than floating-point numbers are those of the last step.

    Args:
        model: the network that is trained.
        decay: the largest d, below 1.

    Source: TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``; the average itself is torch's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.averaged = AveragedModel(copy_model(model), multi_avg_fn=self._average, use_buffers=True)

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights."""
        return self.averaged.module

    def update(self) -> None:
        """Take in the weights as they are after a step."""
        self.averaged.update_parameters(self.model)

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the averaged weights into the network that is trained."""
        networks = (chain(network.parameters(), network.buffers()) for network in (self.model, self.network))
        for own, average in zip(*networks, strict=True):
            own.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and their number."""
        return self.averaged.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.averaged.load_state_dict(state)

    def _average(self, averages: Any, values: Any, _count: Tensor | int) -> None:
        steps = int(self.averaged.n_averaged)  # on the CPU; the argument may be on a GPU, which would be waited for
        floating = averages[0].is_floating_point() or averages[0].is_complex()
        # torch's function would round averages of whole numbers, indices say, downwards.
        decay = min(self.decay, (1 + steps) / (10 + steps)) if floating else 0.0
        get_ema_multi_avg_fn(decay)(averages, values, steps)
