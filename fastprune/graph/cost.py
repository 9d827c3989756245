"""The cost of a network when only some channels stay: exact, and differentiable in the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

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
    """The size of one dimension of a tensor as a function of the kept units of every group.

    Args:
        tensor: the tensor's name.
        dim: the dimension.
        size: number of its indices in the full network.
        fixed: number of its indices that always stay.
        counts: {group: number of indices of each of its units}.
    """

    tensor: str
    dim: int
    size: int
    fixed: int
    counts: Mapping[int, int]


@dataclass(frozen=True)
class Term:
    """A product of sizes: the elements of a weight, say, or of an activation.

    Args:
        tensor: the tensor that it belongs to.
        dims: the shrinking dimensions whose sizes it multiplies, as (tensor, dim).
        constant: the product of its other sizes.
        macs: multiply-accumulates per element and sample.
        params: parameters per element.
    """

    tensor: str
    dims: tuple[tuple[str, int], ...]
    constant: float
    macs: float
    params: float


@dataclass
class CostModel:
    """MACs and parameters as a polynomial in the kept units of each group.

    Every parameter has Π_d size_d elements, and a convolution or linear layer uses each element of its weight once
    per output position. So the number of parameters is Σ_p Π_d size_{p,d}, MACs are Σ_p positions_p Π_d size_{p,d},
    and each size is affine in the kept units of the groups.

    Args:
        offsets: where each group's units start in the flat vector, int64 [G+1].
        terms: the polynomial.
        dims: the dimensions that shrink.
        fixed_macs: MACs of layers that always stay: their weights are computed or used in a way that is not understood.
    """

    offsets: Tensor
    terms: Sequence[Term]
    dims: Sequence[SlicedDim]
    fixed_macs: float = 0
    _on_device: dict[torch.device, tuple[Tensor, ...]] = field(init=False, default_factory=dict, repr=False)

    def __call__(self, mask: Tensor) -> Cost:
        """Return the cost under a flat mask [U] of keep decisions (0/1 or soft, any real or boolean dtype)."""
        return self.of_widths(self.kept(mask))

    def kept(self, mask: Tensor) -> Tensor:
        """Return the number of kept units of each group, float64 [G], of a flat mask [U]."""
        return count_kept(mask, self._tables(mask.device)[0], len(self.offsets) - 1)

    def of_widths(self, kept: Tensor) -> Cost:
        """Return the cost for numbers of kept units per group, float64 [..., G]."""
        *_, macs, params = self._tables(kept.device)
        elements = self.elements(kept)
        return Cost(macs=elements @ macs + self.fixed_macs, params=elements @ params)

    def elements(self, kept: Tensor) -> Tensor:
        """Return the value of each term, float64 [..., T], for numbers of kept units per group [..., G]."""
        _, incidence, fixed, factors, constant, *_ = self._tables(kept.device)
        sizes = kept @ incidence.T + fixed
        # Not prod: its gradient counts zeros on the host.
        return reduce(torch.mul, sizes[..., factors].unbind(-1), constant)

    def _tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the group of each unit; incidence [S+1, G] and fixed part [S+1] of each size (the last is 1); and for
        each term the sizes that it multiplies [T, D], its constant [T], its MACs [T] and its parameters [T].
        """
        if device not in self._on_device:
            self._on_device[device] = tuple(table.to(device) for table in self._build())
        return self._on_device[device]

    def _build(self) -> tuple[Tensor, ...]:
        num_groups = len(self.offsets) - 1
        incidence = np.zeros((len(self.dims) + 1, num_groups))
        fixed = np.ones(len(self.dims) + 1)
        rows: dict[tuple[str, int], int] = {}
        for row, sliced in enumerate(self.dims):
            rows[sliced.tensor, sliced.dim] = row
            fixed[row] = sliced.fixed
            for group, count in sliced.counts.items():
                incidence[row, group] = count
        depth = max([1, *(len(term.dims) for term in self.terms)])
        one = len(self.dims)
        factors = [[rows[dim] for dim in term.dims] + [one] * (depth - len(term.dims)) for term in self.terms]
        numbers = np.array([(term.constant, term.macs, term.params) for term in self.terms]).reshape(-1, 3)
        return (
            torch.repeat_interleave(torch.arange(num_groups), self.offsets.diff()),
            torch.from_numpy(incidence),
            torch.from_numpy(fixed),
            torch.tensor(factors, dtype=torch.int64).reshape(len(factors), depth),
            *torch.from_numpy(numbers.astype(np.float64).T.copy()),
        )


def count_kept(mask: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return the number of kept units of each group, float64 [G].

    Args:
        mask: flat mask [U], 0/1 or soft, any real or boolean dtype.
        groups: the group of each unit, int64 [U], on the mask's device.
        num_groups: the number G of groups.

    Raises:
        ValueError: if the mask has another shape.
    """
    if mask.shape != groups.shape:
        raise ValueError(f"mask: a vector of {len(groups)} units is needed, got shape {tuple(mask.shape)}")
    kept = torch.zeros(num_groups, dtype=torch.float64, device=mask.device)
    return kept.index_add(0, groups, mask.to(torch.float64))


def terms_of(
    shapes: Mapping[str, tuple[int, ...]], dims: Sequence[SlicedDim], positions: Mapping[str, int], *, counted: bool
) -> list[Term]:
    """Return one term per tensor.

    Args:
        shapes: full shapes of the tensors.
        dims: the dimensions that shrink.
        positions: number of uses of each element of a weight per sample.
        counted: whether the tensors are parameters. Buffers that convolutions use as weights (blur filters, say) cost
            MACs, but are no parameters.
    """
    shrinking: dict[str, list[int]] = {}
    for sliced in dims:
        shrinking.setdefault(sliced.tensor, []).append(sliced.dim)
    terms = []
    for name, shape in shapes.items():
        own = shrinking.get(name, [])
        constant = float(np.prod([size for dim, size in enumerate(shape) if dim not in own]))
        terms.append(Term(name, tuple((name, d) for d in own), constant, float(positions.get(name, 0)), float(counted)))
    return terms
