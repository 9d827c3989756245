"""The proximal operator of the group norm, slice by slice."""

from collections.abc import Sequence

import torch
from torch import Tensor


class UnitTable:
    """The norms of units, ``norm_u = sqrt(sum of the squares of all elements of unit u)``.

    The same arguments as :class:`fastprune.ops.UnitTable`.
    """

    def __init__(self, slices: Sequence[tuple[Tensor, int, Tensor]], num_units: int) -> None:
        self.slices = list(slices)
        self.num_units = num_units
        self.sizes = torch.zeros(num_units, dtype=torch.int64)
        for tensor, dim, units in self.slices:
            elements = tensor.numel() // max(tensor.size(dim), 1)
            owned = units[units >= 0].cpu()
            self.sizes.index_add_(0, owned, torch.full_like(owned, elements))

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the Euclidean norm of every unit, ``[U]``."""
        tensor, _, _ = self.slices[0]
        squares = tensor.new_zeros(self.num_units)
        for tensor, dim, units in self.slices:
            others = [d for d in range(tensor.ndim) if d != dim % tensor.ndim]
            by_position = tensor.square().sum(others) if others else tensor.square()
            owned = units >= 0
            squares.index_add_(0, units[owned], by_position[owned])
        return squares.sqrt()


@torch.no_grad()
def group_prox_(table: UnitTable, threshold: Tensor) -> Tensor:
    """``w_u = max(0, 1 - threshold_u / norm_u) * w_u`` for the elements w_u of every unit u, in place.

    The same arguments as :func:`fastprune.ops.group_prox_`. A unit of threshold 0 or of no finite norm stays.

    Returns:
        The norms before, ``[U]``.
    """
    norms = table.norms()
    dead = (threshold > 0) & (threshold >= norms)
    kept = (threshold == 0) | ~norms.isfinite()
    factors = torch.where(dead, 0, torch.where(kept, 1, 1 - threshold / norms))
    for tensor, dim, units in table.slices:
        shape = [-1 if d == dim % tensor.ndim else 1 for d in range(tensor.ndim)]
        owned = units >= 0
        by_position = torch.where(owned, factors[units.clamp(min=0)], 1).reshape(shape)
        # A factor of 1 keeps even the bits of a NaN; a factor of 0 ends infinite elements, too.
        scaled = torch.where(by_position == 0, 0, tensor * by_position)
        tensor.copy_(torch.where(by_position == 1, tensor, scaled))
    return norms
