"""Sources of samples: tensors in memory, or a dataset that reads one sample at a time in worker processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastprune.data.augment import ShiftAndFlip
from fastprune.data.batches import Indices, Noise

Batch = tuple[Any, Any]
"""Images [N, C, H, W], float32, normalised; labels [N], int64. A user's own data may give any inputs and targets."""

Draw = tuple[Indices, Noise | None]
"""The samples of a batch, and one word of random bits for each; None = no augmentation."""


class Source(ABC):
    """Labelled images with random access.

    Attributes:
        pixel_std: the deviation by which each channel of pixels from 0 to 1 is divided; None = not known.
    """

    pixel_std: tuple[float, ...] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def read(self, draws: Sequence[Draw]) -> Iterator[Batch]:
        """Read the batches that ``draws`` lists, in order."""

    @abstractmethod
    def labels_of_all(self) -> Indices:
        """Return the class of each sample, without reading images."""

    def to(self, device: torch.device) -> Source:
        """Return the same source with its data on ``device`` if that saves copies; otherwise unchanged."""
        return self


@dataclass(frozen=True)
class TensorSource(Source):
    """Images that fit in memory, kept as bytes and normalised batch by batch.

    Args:
        images: [N, C, H, W], uint8.
        labels: [N], int64.
        mean: [C], in units of the bytes.
        std: [C], in units of the bytes.
        augmentation: turns images and random bits into augmented images; None for a set that is never augmented.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    augmentation: ShiftAndFlip | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, draws: Sequence[Draw]) -> Iterator[Batch]:
        """Read the batches that ``draws`` lists, in order."""
        mean = self.mean[:, None, None]
        std = self.std[:, None, None]
        for indices, noise in draws:
            chosen = torch.from_numpy(indices).to(self.images.device)
            images = self.images[chosen]
            if noise is not None and self.augmentation is not None:
                images = self.augmentation(images, noise)
            yield (images.float() - mean) / std, self.labels[chosen]

    def labels_of_all(self) -> Indices:
        """Return the class of each sample."""
        return self.labels.cpu().numpy()

    def to(self, device: torch.device) -> TensorSource:
        """Return the same source with its tensors on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "mean", "std")}
        return replace(self, **moved)


Transform = Callable[[object], Tensor]


class Samples(Dataset[tuple[Tensor, int]]):
    """A torch dataset with keys (sample, random bits), so that augmentation depends on the sample alone.

    Args:
        dataset: the dataset of (image, label), with the attribute ``targets``, all labels; images of any kind that the
            transforms take.
        plain: transform of images without random bits.
        augmented: transform of the others, with torch's generator seeded from the random bits.
    """

    def __init__(self, dataset: Dataset[tuple[object, int]], plain: Transform, augmented: Transform) -> None:
        self.dataset = dataset
        self.plain = plain
        self.augmented = augmented

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int]:
        index, noise = key
        image, label = self.dataset[index]
        if noise is None:
            return self.plain(image), label
        with torch.random.fork_rng(devices=[]):  # without workers this is the training process itself
            torch.default_generator.manual_seed(noise)
            return self.augmented(image), label


@dataclass(frozen=True)
class DatasetSource(Source):
    """Samples that are read one at a time, by ``workers`` processes ahead of the training.

    Args:
        samples: the dataset with keys (sample, random bits).
        size: number of samples.
        workers: reading processes; 0 reads in the training process.
        pixel_std: as of every source.
    """

    samples: Samples
    size: int
    workers: int
    pixel_std: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return self.size

    def labels_of_all(self) -> Indices:
        """Return the class of each sample."""
        targets: Any = self.samples.dataset
        return np.asarray(list(targets.targets), dtype=np.int64)

    def read(self, draws: Sequence[Draw]) -> Iterator[Batch]:
        """Read the batches that ``draws`` lists, in order."""
        keys = [
            list(zip(indices.tolist(), [None] * len(indices) if noise is None else noise.tolist(), strict=True))
            for indices, noise in draws
        ]
        yield from DataLoader(
            self.samples,
            batch_sampler=keys,
            num_workers=min(self.workers, len(keys)),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise a loader draws from torch's default one
        )
