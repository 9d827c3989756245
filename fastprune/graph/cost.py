"""What a network costs when only some channels stay: exact, and differentiable in the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """The cost of one network for one sample.

    Args:
        macs: multiply-accumulates of convolutions and linear layers, float64 scalar (or one per row of a batch).
        params: number of parameters, float64 like ``macs``.
    """

    macs: Tensor
    params: Tensor


@dataclass(frozen=True)
class SlicedDim:
    """How long one dimension of a tensor is, given the number of kept units of every group.

    Args:
        tensor: the tensor's name.
        dim: the dimension.
        fixed: indices that always stay.
        counts: for each group, how many indices each of its units holds: {group: count}.
    """

    tensor: str
    dim: int
    fixed: int
    counts: Mapping[int, int]


@dataclass
class CostModel:
    """MACs and parameters as polynomials in the kept units of each group.

    Every parameter has Π_d size_d elements, and a convolution or linear layer uses each element of its weight once
    per output position. So the number of parameters is Σ_p Π_d size_{p,d}, MACs are Σ_p positions_p Π_d size_{p,d},
    and each size is affine in the kept units of the groups.

    Args:
        offsets: where each group's units start in the flat vector, int64 [G+1].
        shapes: the parameters' full shapes.
        positions: uses of each element of a weight per sample.
        dims: the dimensions that shrink.
        fixed_macs: MACs that always stay, of layers whose weights are computed or used in a way that is not understood.
        filters: full shapes of buffers that convolutions use as weights (blur filters, say): MACs, but no parameters.
    """

    offsets: Tensor
    shapes: Mapping[str, tuple[int, ...]]
    positions: Mapping[str, int]
    dims: Sequence[SlicedDim]
    fixed_macs: int = 0
    filters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    _on_device: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def __call__(self, mask: Tensor) -> Cost:
        """The cost under a flat mask [U] of keep decisions (0/1 or soft, any real or boolean dtype)."""
        units = int(self.offsets[-1])
        if mask.shape != (units,):
            raise ValueError(f"mask: a vector of {units} units is needed, got shape {tuple(mask.shape)}")
        groups = self._tables(mask.device)[0]
        kept = torch.zeros(len(self.offsets) - 1, dtype=torch.float64, device=mask.device)
        return self.of_widths(kept.index_add(0, groups, mask.to(torch.float64)))

    def of_widths(self, kept: Tensor) -> Cost:
        """The cost for numbers of kept units per group, float64 [..., G]."""
        _, incidence, fixed, factors, constant, positions, counted = self._tables(kept.device)
        sizes = kept @ incidence.T + fixed
        elements = constant * sizes[..., factors].prod(-1)
        return Cost(macs=elements @ positions + self.fixed_macs, params=elements @ counted)

    def _tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """Group of each unit; incidence [S+1, G] and fixed part [S+1] of each size (the last is 1); and for each
        parameter or filter the sizes that it multiplies [P, D], the product of its other sizes [P], its positions [P],
        and whether it is a parameter [P].
        """
        if device not in self._on_device:
            self._on_device[device] = tuple(table.to(device) for table in self._build())
        return self._on_device[device]

    def _build(self) -> tuple[Tensor, ...]:
        num_groups = len(self.offsets) - 1
        incidence = np.zeros((len(self.dims) + 1, num_groups))
        fixed = np.ones(len(self.dims) + 1)
        sized: dict[str, list[int]] = {}
        for row, sliced in enumerate(self.dims):
            fixed[row] = sliced.fixed
            for group, count in sliced.counts.items():
                incidence[row, group] = count
            sized.setdefault(sliced.tensor, []).append(row)
        depth = max((len(rows) for rows in sized.values()), default=1)
        one = len(self.dims)
        factors, constant, positions = [], [], []
        for name, shape in (*self.shapes.items(), *self.filters.items()):
            rows = sized.get(name, [])
            shrinking = {self.dims[row].dim for row in rows}
            factors.append(rows + [one] * (depth - len(rows)))
            constant.append(float(np.prod([size for dim, size in enumerate(shape) if dim not in shrinking])))
            positions.append(float(self.positions.get(name, 0)))
        groups = torch.repeat_interleave(torch.arange(num_groups), self.offsets.diff())
        floats = (torch.tensor(x, dtype=torch.float64) for x in (incidence, fixed))
        return (
            groups,
            *floats,
            torch.tensor(factors, dtype=torch.int64).reshape(len(factors), depth),
            torch.tensor(constant, dtype=torch.float64),
            torch.tensor(positions, dtype=torch.float64),
            torch.tensor([1.0] * len(self.shapes) + [0.0] * len(self.filters), dtype=torch.float64),
        )
