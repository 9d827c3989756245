"""Times between the measured widths: all tables of a network as tensors, interpolated in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune.graph.latency.axes import Axis
from fastprune.graph.latency.operations import Measured

ALWAYS = Axis(1, 1, ())


@dataclass(frozen=True)
class Knots:
    """The measured widths of one kind (whole blocks, or others) of A axes.

    Args:
        widths: ascending [A, k]; missing ones lie behind the last one.
        places: the place of each knot among all knots of its axis, int64 [A, k].
        last: number of the last interval, int64 [A, 1].
        ends: the smallest and the largest knot [A, 1] each.
        any: whether there are knots at all, 0 or 1 [A, 1].
    """

    widths: Tensor
    places: Tensor
    last: Tensor
    ends: tuple[Tensor, Tensor]
    any: Tensor

    @staticmethod
    def from_axes(knots: Sequence[tuple[int, ...]], places: Sequence[int], device: torch.device) -> Knots:
        """Return the knots of axes, given each axis' knots and the place of its first one."""
        counts = torch.tensor([[len(own)] for own in knots], device=device)
        most = max(2, int(counts.max()) + 1)
        behind = [max(own, default=0) + 1 for own in knots]
        rows = [[*own, *range(end, end + most - len(own))] for own, end in zip(knots, behind, strict=True)]
        widths = torch.tensor(rows, dtype=torch.float64, device=device)
        numbers = torch.arange(most, device=device).minimum((counts - 1).clamp(min=0))  # missing knots weigh nothing
        return Knots(
            widths=widths,
            places=numbers + torch.tensor(places, device=device)[:, None],
            last=(counts - 2).clamp(min=0),
            ends=(widths[:, :1], widths.gather(1, (counts - 1).clamp(min=0))),
            any=(counts > 0).to(torch.float64),
        )

    def add_to(self, weights: Tensor, widths: Tensor, share: Tensor) -> Tensor:
        """Add to ``weights`` [A, R, K] those of these knots for ``widths`` [A, R], times ``share`` [A, R]."""
        interval = (torch.searchsorted(self.widths, widths.detach(), right=True) - 1).clamp(min=0).minimum(self.last)
        low, high = self.widths.gather(1, interval), self.widths.gather(1, interval + 1)
        along = (widths.clamp(*self.ends) - low) / (high - low)
        for number, part in ((interval, 1 - along), (interval + 1, along)):
            places = self.places.gather(1, number)
            weights = weights.scatter_add(2, places[..., None], (share * part)[..., None])
        return weights


@dataclass(frozen=True)
class Interpolation:
    """All tables of a network as tensors: A axes with K knots at most, L pairs of axes that times depend on.

    Args:
        groups: the group of each unit, int64 [U].
        incidence: channels of an axis for a unit of a group, float64 [A, G].
        fixed: channels of an axis that always stay [A].
        block: channels of a block [A, 1].
        broken: measured widths that are no whole blocks.
        whole: measured widths that are whole blocks.
        pairs: two axes each, int64 [L, 2].
        ms: times by knots [L, K, K].
        overhead: milliseconds that are added to each sum.
    """

    groups: Tensor
    incidence: Tensor
    fixed: Tensor
    block: Tensor
    broken: Knots
    whole: Knots
    pairs: Tensor
    ms: Tensor
    overhead: float

    @staticmethod
    def from_measured(
        offsets: Tensor, measured: Sequence[Measured], overhead: float, device: torch.device
    ) -> Interpolation:
        """Return the tables as tensors; the times of operations that depend on the same widths are added up."""
        summed = sum_tables(measured)
        axes = list(dict.fromkeys(axis for pair in summed for axis in pair))
        most = max((len(axis.knots) for axis in axes), default=1)
        incidence = torch.zeros(len(axes), len(offsets) - 1, dtype=torch.float64)
        for row, axis in enumerate(axes):
            for group, count in axis.counts:
                incidence[row, group] = count
        ms = torch.zeros(len(summed), most, most, dtype=torch.float64)
        for row, values in enumerate(summed.values()):
            ms[row, : values.shape[0], : values.shape[1]] = values
        place = {axis: number for number, axis in enumerate(axes)}
        first_whole = [len(axis.broken) if axis.whole else 0 for axis in axes]
        return Interpolation(
            groups=torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff()).to(device),
            incidence=incidence.to(device),
            fixed=torch.tensor([float(axis.fixed) for axis in axes], dtype=torch.float64, device=device),
            block=torch.tensor([[float(axis.block)] for axis in axes], dtype=torch.float64, device=device),
            broken=Knots.from_axes([axis.broken for axis in axes], [0] * len(axes), device),
            whole=Knots.from_axes([axis.whole for axis in axes], first_whole, device),
            pairs=torch.tensor([[place[a], place[b]] for a, b in summed], device=device).reshape(-1, 2),
            ms=ms.to(device),
            overhead=overhead,
        )

    def milliseconds(self, kept: Tensor) -> Tensor:
        """Return the interpolated sum of all times; see ``LatencyModel.of_widths``."""
        widths = kept.to(torch.float64) @ self.incidence.T + self.fixed
        weights = self.weights(widths.reshape(-1, len(self.fixed)).T.contiguous())
        first, second = weights[self.pairs[:, 0]], weights[self.pairs[:, 1]]
        return (torch.bmm(first, self.ms) * second).sum((0, 2)).reshape(widths.shape[:-1]) + self.overhead

    def weights(self, widths: Tensor) -> Tensor:
        """Return the weight of each knot [A, R, K] for ``widths`` [A, R]."""
        nearest = (widths.detach() / self.block).round().clamp(min=1) * self.block
        whole = torch.relu(1 - (widths - nearest).abs()) * self.whole.any
        weights = widths.new_zeros(*widths.shape, self.ms.shape[-1])
        return self.whole.add_to(self.broken.add_to(weights, widths, 1 - whole), widths, whole)


def sum_tables(measured: Sequence[Measured]) -> dict[tuple[Axis, Axis], Tensor]:
    """Return the sum of the tables of all operations that depend on the same two axes."""
    summed: dict[tuple[Axis, Axis], Tensor] = {}
    for m in measured:
        first, second = [ALWAYS, ALWAYS, *(axis if axis.counts else ALWAYS for axis in m.operation.axes)][-2:]
        ms = torch.tensor(m.table, dtype=torch.float64)
        summed[first, second] = summed[first, second] + ms if (first, second) in summed else ms
    return summed
