"""topk_mask beside ways to treat ragged groups with torch.

``loop`` is fastprune.reference: plain torch, group by group. ``padded`` is our best version with one torch.sort over a
padded matrix; ``compiled`` is that under torch.compile. Every call gets new scores: repeated ones teach the CPU's
branch predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastprune import ops, reference
from fastprune.bench.case import Case, Compiled
from fastprune.bench.shapes import RESNET50_GROUPS

SWEEP = [1_000, 10_000, 100_000, 1_000_000]


class Layout:
    """Channel groups at keep ratio 0.5 with DDNP's window, a tenth of each group."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self.units = sum(sizes)
        self.sizes = torch.tensor(sizes, device=device)
        self.offsets = torch.tensor([0, *sizes]).cumsum(0).to(device)
        self.keep = torch.full((len(sizes),), 0.5, device=device)
        self.window = (0.1 * self.sizes).round()
        # The padded variant is not charged for these. Positions, not a boolean matrix: on CUDA indexing with that
        # waits for the number of its true elements.
        self.columns = torch.arange(max(sizes), device=device)
        self.inside = (self.columns < self.sizes[:, None]).flatten().nonzero()[:, 0]

    def draw(self) -> tuple[Tensor]:
        """Draw scores like those of DDNP's generator."""
        return (torch.randn(self.units, device=self.offsets.device).sigmoid(),)

    def loop(self, scores: Tensor) -> Tensor:
        """Sort each group."""
        return reference.topk_mask(scores, self.keep, self.offsets, self.window)

    def padded(self, scores: Tensor) -> Tensor:
        """Pad all groups to the largest and sort once. Divides by windows, which are not 0 here."""
        centre = self.sizes * self.keep
        width = torch.minimum(self.window, torch.minimum(2 * (self.sizes - centre), 2 * centre))
        t = ((centre[:, None] - (self.columns + 0.5)) / width[:, None]).clamp(-0.5, 0.5)
        by_rank = -2 * t**3 + 1.5 * t + 0.5
        matrix = torch.full_like(by_rank, -torch.inf)
        matrix.view(-1)[self.inside] = scores
        order = torch.sort(matrix, dim=1, descending=True, stable=True).indices
        return torch.empty_like(matrix).scatter_(1, order, by_rank).view(-1)[self.inside]

    def fastprune(self, scores: Tensor) -> Tensor:
        """Call the fused operator."""
        return ops.topk_mask(scores, self.keep, self.offsets, self.window)


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Yield ResNet-50's groups, single groups of many sizes, and many groups of one size."""
    if quick:
        yield case("8 groups", [16, 30, 64, 10, 30, 30, 20, 100], device)
        return
    yield case("ResNet-50, 37 groups", RESNET50_GROUPS, device, compiled=True)
    for size in SWEEP:
        yield case(f"one group of {size:,}", [size], device)
    for size in SWEEP[:-1]:
        yield case(f"{SWEEP[-1] // size:,} groups of {size:,}", [size] * (SWEEP[-1] // size), device)


def case(name: str, sizes: list[int], device: torch.device, *, compiled: bool = False) -> Case:
    """Return the case of one layout; ``compiled`` is for real groups: in others a sort dominates, and cannot gain."""
    layout = Layout(sizes, device)
    variants: dict[str, Callable[..., Tensor]] = {"loop": layout.loop, "padded": layout.padded}
    if compiled:
        variants["compiled"] = Compiled(layout.padded, device)
    variants["fastprune"] = layout.fastprune
    shape = {"groups": len(sizes), "units": layout.units, "largest": max(sizes)}
    # Scores in, masks out; numbers per group are few.
    return Case(name, layout.draw, variants, bytes=8 * layout.units, shape=shape, units=layout.units, atol=1e-4)
