"""Synthetic images of any size: for timing, for trying a set-up, and for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.data.batches import Indices, hashed
from fastprune.data.sources import Batch, Draw, Source

_POOL = 16  # different noise images; each sample shifts one of them by its own amount


@dataclass(frozen=True)
class SyntheticSource(Source):
    """Synthetic samples: sample i, of class i modulo ``num_classes``, is the class's coarse pattern under noise.

    (seed, i) fixes the noise. An image costs one gather and one sum: the data hardly count when a training is timed.

    Args:
        shape: (C, H, W) of one image.
        num_classes: number of classes.
        first: number of the first sample, so that training and test samples differ.
        size: number of samples.
        seed: seed of patterns and noise.
        patterns: [num_classes, C, ⌈H/32⌉+1, ⌈W/32⌉+1], unit normal.
        pool: [16, C, H, W], unit normal.
    """

    shape: tuple[int, int, int]
    num_classes: int
    first: int
    size: int
    seed: int
    patterns: Tensor
    pool: Tensor

    @staticmethod
    def make(shape: tuple[int, int, int], num_classes: int, first: int, size: int, seed: int) -> SyntheticSource:
        """Draw patterns and noise."""
        generator = torch.Generator().manual_seed(seed)
        channels, height, width = shape
        coarse = (channels, -(-height // 32) + 1, -(-width // 32) + 1)
        patterns = torch.randn(num_classes, *coarse, generator=generator)
        pool = torch.randn(_POOL, *shape, generator=generator)
        return SyntheticSource(shape, num_classes, first, size, seed, patterns, pool)

    def __len__(self) -> int:
        return self.size

    def read(self, draws: Sequence[Draw]) -> Iterator[Batch]:
        """Make the batches that ``draws`` lists, in order."""
        device = self.pool.device
        columns = torch.arange(self.shape[2], device=device)
        for indices, _ in draws:
            numbers = indices + self.first
            labels = torch.from_numpy(numbers % self.num_classes).to(device)
            bits = hashed(self.seed, numbers)
            which = torch.from_numpy((bits % np.uint64(_POOL)).astype(np.int64)).to(device)
            shift = torch.from_numpy(((bits >> np.uint64(8)) % np.uint64(self.shape[2])).astype(np.int64)).to(device)
            rolled = (columns + shift[:, None]) % self.shape[2]
            noise = self.pool[which].gather(3, rolled[:, None, None, :].expand(-1, *self.shape[:2], -1))
            pattern = F.interpolate(self.patterns[labels], size=self.shape[1:], mode="bilinear", align_corners=True)
            yield pattern + noise, labels

    def labels_of_all(self) -> Indices:
        """Return the class of each sample."""
        return (np.arange(self.size) + self.first) % self.num_classes

    def to(self, device: torch.device) -> SyntheticSource:
        """Return the same source with its tensors on ``device``."""
        return replace(self, patterns=self.patterns.to(device), pool=self.pool.to(device))
