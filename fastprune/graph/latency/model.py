"""The latency of a network when only some channels stay: measured operators, added up, interpolated in the widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastprune.graph.cost import count_kept
from fastprune.graph.latency.interpolation import Interpolation
from fastprune.graph.latency.operations import Measured


@dataclass(frozen=True)
class LatencyRow:
    """The time of one operator of the full network.

    Args:
        layer: the module whose code calls it.
        operator: its name.
        ms: milliseconds.
    """

    layer: str
    operator: str
    ms: float


@dataclass
class LatencyModel:
    """Milliseconds of a forward pass, as a sum over operators, interpolated (bi)linearly between measured widths.

    Widths that are whole blocks of channels lie on a line (or plane) of their own; from it to the next width on either
    side, time is linear, too.

    Args:
        offsets: index of each group's first unit in the flat vector, int64 [G+1].
        measured: every operation of the network.
        overhead: milliseconds that the calls of the network's modules take at any width.
        device: the name of the processor or GPU.
        batch: samples in a pass.
        dtype: dtype of parameters and inputs.
        channels_last: whether parameters and inputs have this memory layout.
        threads: threads of the CPU.
    """

    offsets: Tensor
    measured: Sequence[Measured] = field(repr=False)
    overhead: float
    device: str
    batch: int
    dtype: torch.dtype
    channels_last: bool
    threads: int
    _on_device: dict[torch.device, Interpolation] = field(default_factory=dict, repr=False)

    def __call__(self, mask: Tensor) -> Tensor:
        """Return milliseconds under a flat mask.

        Args:
            mask: [U], 0/1 or soft, any real or boolean dtype.

        Returns:
            float64 scalar, differentiable in the mask.

        Raises:
            ValueError: if the mask has another shape.
        """
        return self.of_widths(count_kept(mask, self._interpolation(mask.device).groups, len(self.offsets) - 1))

    def of_widths(self, kept: Tensor) -> Tensor:
        """Return milliseconds [...] for numbers of kept units per group, float64 [..., G].

        Widths beyond the measured ones (a group without units, say) cost as much as the nearest measured one.

        Raises:
            ValueError: if the last dimension is not one number per group.
        """
        if kept.shape[-1:] != (len(self.offsets) - 1,):
            raise ValueError(
                f"kept: numbers for {len(self.offsets) - 1} groups are needed, got shape {tuple(kept.shape)}"
            )
        return self._interpolation(kept.device).milliseconds(kept)

    def table(self) -> list[LatencyRow]:
        """Return the time of each operator of the full network, in the order of execution."""
        return [LatencyRow(m.operation.module, m.operation.operator, m.full_ms) for m in self.measured]

    def times(self) -> Tensor:
        """Return all measured times as one float64 vector."""
        flat = [ms for m in self.measured for row in m.table for ms in row]
        return torch.tensor([*flat, self.overhead], dtype=torch.float64)

    def with_times(self, times: Tensor) -> LatencyModel:
        """Return the same model with other times, a vector of ``times`` for the same network."""
        values = iter(times.tolist())
        measured = [replace(m, table=[[next(values) for _ in row] for row in m.table]) for m in self.measured]
        return replace(self, measured=measured, overhead=next(values), _on_device={})

    def _interpolation(self, device: torch.device) -> Interpolation:
        if device not in self._on_device:
            self._on_device[device] = Interpolation.from_measured(self.offsets, self.measured, self.overhead, device)
        return self._on_device[device]
