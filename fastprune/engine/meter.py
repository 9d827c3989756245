"""Means of the steps' metrics between two lines of the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastprune.host.distributed import Distributed
from fastprune.host.errors import UserError


class NonFiniteError(UserError):
    """A loss that is infinite or not a number."""


class Meter:
    """Sums of metrics, kept on their device so that a step never waits for them.

    Args:
        device: device on which ``reduce`` talks to the other ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Add the metrics of one step; the names must be the same on every rank."""
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                number = value.detach().double()
            else:  # stays on the CPU: a copy to the device at each step would cost more than the sum
                number = torch.tensor(float(value), dtype=torch.float64)
            self.sums[name] = self.sums[name] + number if name in self.sums else number
            self.counts[name] = self.counts.get(name, 0) + 1

    def reduce(self, distributed: Distributed) -> dict[str, float]:
        """Return the means over steps and ranks; all ranks must call.

        Raises:
            NonFiniteError: on every rank, if the mean of a metric named ``…loss`` is not finite.
        """
        if not self.sums:
            return {}
        names = sorted(self.sums)
        # One collective for all metrics. Afterwards every rank holds the common sums, which a checkpoint saves.
        common = distributed.mean_(torch.stack([self.sums[name].to(self.device) for name in names]))
        self.sums = dict(zip(names, common.unbind(), strict=True))
        values = common.tolist()
        means = {name: value / self.counts[name] for name, value in zip(names, values, strict=True)}
        for name, mean in means.items():
            if name.endswith("loss") and not math.isfinite(mean):
                raise NonFiniteError(f"{name} is {mean}")
        return means

    def reset(self) -> None:
        """Start the next interval."""
        self.sums.clear()
        self.counts.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return sums and counts so far."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])
