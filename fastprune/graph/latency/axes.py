"""The numbers of channels that operators' times depend on, and the widths at which operators are measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

POINTS = 4  # measured widths of each kind at most


@dataclass(frozen=True)
class Axis:
    """A number of channels that shrinks with the groups.

    Kernels compute blocks of channels, so that an operator with 65 channels may take as long as with 80, or, without a
    vectorised path, twice as long as with 64. So the grid has widths that are whole blocks, and others.

    Args:
        size: channels in the full network.
        fixed: channels that always stay.
        counts: (group, channels of each of its units).
        step: a grouped convolution has a multiple of this number of channels.
        block: channels that the machine's kernels compute together, 8 or 16.
    """

    size: int
    fixed: int
    counts: tuple[tuple[int, int], ...]
    step: int = 1
    block: int = 8

    @property
    def whole(self) -> tuple[int, ...]:
        """Measured widths that are whole blocks, the smallest and the largest included."""
        blocks = self.size // self.block if self.counts and self.step == 1 else 0
        return tuple(self.block * count for count in spaced_numbers(1, blocks))

    @property
    def broken(self) -> tuple[int, ...]:
        """Measured widths that are no whole blocks, the smallest and the largest included.

        For a grouped convolution these are all measured widths.
        """
        if not self.counts:
            return (self.size,)
        if self.step > 1:
            return tuple(self.step * count for count in spaced_numbers(1, self.size // self.step, 2 * POINTS))
        largest = self.size if self.size % self.block else self.size - 1
        found = spaced_numbers(1, largest)
        odd = self.block // 2 - 1  # in the middle of a block, a width that suits no kernel
        inner = (width // self.block * self.block + odd if width > 2 * self.block else width for width in found[1:-1])
        return tuple(sorted({found[0], *(width - (width % self.block == 0) for width in inner), found[-1]}))

    @property
    def knots(self) -> tuple[int, ...]:
        """All measured widths, first those that are no whole blocks."""
        return (*self.broken, *self.whole)


def spaced_numbers(low: int, high: int, points: int = POINTS) -> list[int]:
    """Return evenly spaced whole numbers from ``low`` to ``high``, both included; none if ``high`` is lower."""
    if high < low:
        return []
    steps = max(1, points - 1)
    return sorted({round(low + (high - low) * number / steps) for number in range(steps + 1)})


def block_of(device: torch.device) -> int:
    """Return the number of channels that the device's kernels compute together."""
    wide = device.type == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return 16 if wide else 8
