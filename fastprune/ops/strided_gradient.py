"""The gradient of a strided convolution with respect to its input, by stride-1 convolutions.

Input pixels whose coordinates have the same remainders by the stride, a *phase*, meet the same taps of the kernel,
which are ``stride`` apart. Their gradient is a convolution of dz with these taps, and no product is with a zero. 3x3
with stride 2 has four phases, of 1, 2, 2 and 4 taps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastprune.ops import packed_conv
from fastprune.ops.convolution import Geometry
from fastprune.ops.layout import empty_rows
from fastprune.ops.packed_conv import PackedWeight


@dataclass(frozen=True)
class Phase:
    """The pixels ``[row::stride, column::stride]`` of the input, and the weight that gives their gradient."""

    row: int
    column: int
    packed: PackedWeight | None  # None: no tap meets them

    def of(self, x: Tensor | None, geometry: Geometry) -> Tensor | None:
        """These pixels of x."""
        return None if x is None else x[:, :, self.row :: geometry.stride[0], self.column :: geometry.stride[1]]


def pack_phases(weight: Tensor, geometry: Geometry) -> list[Phase] | None:
    """The phases of a convolution, in order; None where a phase begins inside of dz, or the kernel is not dense."""
    if geometry.groups != 1 or geometry.dilation != (1, 1):
        return None
    phases = []
    for row in range(geometry.stride[0]):
        for column in range(geometry.stride[1]):
            (top, above), (left, before) = (_taps(weight, geometry, d, phase) for d, phase in enumerate((row, column)))
            taps = weight[:, :, top :: geometry.stride[0], left :: geometry.stride[1]]
            if taps.numel() == 0:
                phases.append(Phase(row, column, None))
                continue
            if min(above, before) < 0:
                return None
            moves = Geometry(padding=(above, before))
            phases.append(Phase(row, column, packed_conv.pack(taps, moves, transposed=True)))
    return phases


def _taps(weight: Tensor, geometry: Geometry, d: int, phase: int) -> tuple[int, int]:
    """In direction d: the first tap that meets the phase, and the padding before dz."""
    stride, size = geometry.stride[d], weight.shape[2 + d]
    whole, first = divmod(phase + geometry.padding[d], stride)
    return first, -(-(size - first) // stride) - 1 - whole


def convolve_phases_back(
    dz: Tensor,
    phases: list[Phase],
    geometry: Geometry,
    x_size: list[int],
    *,
    residual: Tensor | None,
    previous: Tensor | None,
    mask: Tensor | None,
    activation: str,
    want_dmask: bool,
) -> tuple[Tensor, Tensor | None]:
    """What ``packed_conv.convolve_back`` does, phase by phase.

    Args:
        dz: ``[N, k, P, Q]``, the gradient of the first outputs.
        phases: Of the convolution, each with taps if there is a ``residual`` or ``previous``.
        geometry: Of the convolution.
        x_size: ``[N, C, H, W]``.
        residual: As there, like what follows.
        previous: ...
        mask: ...
        activation: ...
        want_dmask: ...
    """
    dx = empty_rows(x_size)
    residual, previous = (None if x is None else packed_conv.in_rows(x) for x in (residual, previous))
    dmask = dz.new_zeros(x_size[1]) if want_dmask else None
    for phase in phases:
        into = phase.of(dx, geometry)
        assert into is not None
        if phase.packed is None:
            into.zero_()
        if phase.packed is None or into.numel() == 0:
            continue
        pixels = (phase.of(residual, geometry), phase.of(previous, geometry))
        before, taps = phase.packed.geometry.padding, phase.packed.size[2:]
        behind = tuple(into.shape[2 + d] + taps[d] - 1 - dz.shape[2 + d] - before[d] for d in (0, 1))
        read = dz[:, :, : dz.shape[2] + min(behind[0], 0), : dz.shape[3] + min(behind[1], 0)]
        part = packed_conv.convolve_back_into(
            into, packed_conv.in_rows(read), phase.packed, *pixels, mask, activation, want_dmask=want_dmask,
            padding_behind=(max(behind[0], 0), max(behind[1], 0)),
        )  # fmt: skip
        if dmask is not None and part is not None:
            dmask += part
    return dx, dmask
