"""Numbers of channels that operators' times depend on, and the widths at which they are measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

POINTS = 4  # widths of each kind that are measured at most


@dataclass(frozen=True)
class Axis:
    """A number of channels that shrinks with the groups.

    Kernels compute blocks of channels, so that an operator with 65 channels may take as long as with 80, or, without a
    vectorised path, twice as long as with 64. So widths are measured that are whole blocks, and others.

    Args:
        size: channels in the full network.
        fixed: those that always stay.
        counts: (group, channels of each of its units).
        step: a grouped convolution has a multiple of so many.
        block: channels that the machine's kernels compute together, 8 or 16.
    """

    size: int
    fixed: int
    counts: tuple[tuple[int, int], ...]
    step: int = 1
    block: int = 8

    @property
    def whole(self) -> tuple[int, ...]:
        """Measured widths that are whole blocks, the smallest and the largest among them."""
        blocks = self.size // self.block if self.counts and self.step == 1 else 0
        return tuple(self.block * count for count in spread(1, blocks))

    @property
    def broken(self) -> tuple[int, ...]:
        """Measured widths that are not, the smallest and the largest among them; all, for a grouped convolution."""
        if not self.counts:
            return (self.size,)
        if self.step > 1:
            return tuple(self.step * count for count in spread(1, self.size // self.step, 2 * POINTS))
        largest = self.size if self.size % self.block else self.size - 1
        found = spread(1, largest)
        odd = self.block // 2 - 1  # in the middle of a block, and of no use to any kernel
        inner = (width // self.block * self.block + odd if width > 2 * self.block else width for width in found[1:-1])
        return tuple(sorted({found[0], *(width - (width % self.block == 0) for width in inner), found[-1]}))

    @property
    def knots(self) -> tuple[int, ...]:
        """All measured widths, first those that are not whole blocks."""
        return (*self.broken, *self.whole)


def spread(low: int, high: int, points: int = POINTS) -> list[int]:
    """Whole numbers from ``low`` to ``high``, evenly, both among them; none where there are none."""
    if high < low:
        return []
    steps = max(1, points - 1)
    return sorted({round(low + (high - low) * number / steps) for number in range(steps + 1)})


def block_of(device: torch.device) -> int:
    """How many channels the device's kernels compute together."""
    wide = device.type == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return 16 if wide else 8
