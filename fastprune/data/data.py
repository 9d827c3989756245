"""A data set in three parts: training, held out of the training set, and test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch

from fastprune.data.batches import BatchPlan, BatchRequest, Indices, Split, hashed, permutation
from fastprune.data.sources import Batch, Source
from fastprune.host.distributed import Distributed

HELD_OUT_SHARE = 0.1
HELD_OUT_MOST = 5000

# First keys of ``hashed``: one per use of the run's seed, so that no two uses share bits.
_HOLD_OUT, _SUBSET, _ORDER, _AUGMENT = range(4)


class Data(ABC):
    """Labelled images, as the engine reads them.

    A subclass has the attributes, ``num_classes``, ``size``, ``steps`` and ``read``.

    Attributes:
        name: what the user typed.
        shape: (C, H, W) of one image, or the shape of a sample of the first input.
        num_classes: number of classes.
    """

    name: str
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def knows_classes(self) -> bool:
        """Whether ``num_classes`` is known."""
        return True

    @property
    def pixel_std(self) -> tuple[float, ...] | None:
        """The deviation by which each channel of pixels from 0 to 1 is divided; None = not known."""
        return None

    @property
    def balanced(self) -> bool:
        """Whether random samples have the same number of each class."""
        return False

    @abstractmethod
    def size(self, split: Split) -> int:
        """Return the number of samples in ``split``; 0 if there is no such part."""

    @abstractmethod
    def steps(
        self,
        split: Split,
        batch_size: int,
        *,
        samples: int | None = None,
        distributed: Distributed | None = None,
    ) -> int:
        """Return the number of batches in one epoch of training."""

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        samples: int | None = None,
        augment: bool = False,
        complete: bool = False,
        distributed: Distributed | None = None,
    ) -> Iterator[Batch]:
        """Read the batches of one epoch, from batch ``start`` on; the arguments are those of ``BatchRequest``.

        Yields:
            Images [n, C, H, W], float32, normalised, and labels [n], int64.
        """
        peers = distributed or Distributed()
        return self.read(BatchRequest(split, batch_size, seed, epoch, start, samples, augment, complete, peers))

    def read(self, request: BatchRequest) -> Iterator[Batch]:
        """Read the batches of ``request``. A subclass overrides this, or ``batches`` with all its arguments.

        Raises:
            NotImplementedError: if a subclass overrides neither.
        """
        raise NotImplementedError(f"{type(self).__name__} has no way to read batches: implement read(request)")

    def to(self, device: torch.device) -> Data:
        """Return the same data with its tensors on ``device``, if it is kept in memory."""
        return self


class SourceData(Data):
    """Data with random access: every batch is a pure function of (seed, epoch, index).

    Args:
        name: what the user typed.
        shape: (C, H, W) of one image.
        num_classes: number of classes.
        train: the training set.
        test: the test set.
        held_out: positions in ``train`` that are never trained on; see ``held_out_part``.
        labels: class of each sample of ``train``, where random samples have the same number of each class, give or take
            one; None = they are drawn without a look at the classes.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        num_classes: int,
        train: Source,
        test: Source,
        held_out: Indices,
        labels: Indices | None = None,
    ) -> None:
        self.name = name
        self.shape: tuple[int, int, int] = shape
        self._num_classes = num_classes
        self._train = train
        self._labels = labels
        self._test = test
        self._parts: dict[Split, Indices] = {
            "train": np.setdiff1d(np.arange(len(train)), held_out),
            "held_out": np.sort(held_out),
            "test": np.arange(len(test)),
        }

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._num_classes

    @property
    def pixel_std(self) -> tuple[float, ...] | None:
        """The deviation by which each channel of pixels from 0 to 1 is divided; None = not known."""
        return self._train.pixel_std

    @property
    def balanced(self) -> bool:
        """Whether random samples have the same number of each class."""
        return self._labels is not None

    def size(self, split: Split) -> int:
        """Return the number of samples in ``split``."""
        return len(self._parts[split])

    def steps(
        self,
        split: Split,
        batch_size: int,
        *,
        samples: int | None = None,
        distributed: Distributed | None = None,
    ) -> int:
        """Return the number of batches in one epoch of training."""
        total = self.size(split) if samples is None else min(samples, self.size(split))
        return len(BatchPlan(np.arange(total), batch_size, distributed or Distributed()))

    def read(self, request: BatchRequest) -> Iterator[Batch]:
        """Read the batches of ``request``."""
        order = self._parts[request.split]
        seed, samples = request.seed, request.samples
        if samples is not None and samples < len(order):
            order = order[permutation(len(order), seed, _SUBSET)]
            if self._labels is not None and request.split != "test":
                order = alternate(order, self._labels)
            order = np.sort(order[:samples])
        if request.split == "train":
            order = order[permutation(len(order), seed, _ORDER, request.epoch)]
        plan = BatchPlan(order, request.batch_size, request.distributed, request.complete)
        draws = []
        for index in range(request.start, len(plan)):
            chosen = plan[index]
            if len(chosen):
                draws.append((chosen, hashed(seed, _AUGMENT, request.epoch, chosen) if request.augment else None))
        return (self._test if request.split == "test" else self._train).read(draws)

    def to(self, device: torch.device) -> SourceData:
        """Return the same data with its tensors on ``device``."""
        return SourceData(
            self.name,
            self.shape,
            self.num_classes,
            self._train.to(device),
            self._test.to(device),
            self._parts["held_out"],
            self._labels,
        )


def alternate(order: Indices, labels: Indices) -> Indices:
    """Return the samples of ``order`` so that classes alternate: first one sample of each, then the second ones, ….

    Args:
        order: positions in a training set.
        labels: class of each sample of the training set.
    """
    classes = labels[order]
    grouped = np.argsort(classes, kind="stable")
    ordered = classes[grouped]
    ranks = np.empty(len(order), dtype=np.int64)  # the number of samples of the same class before each one
    ranks[grouped] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[np.argsort(ranks, kind="stable")]


def held_out_part(size: int, seed: int, amount: int | float | None, labels: Indices | None = None) -> Indices:
    """Draw a random part of a training set, fixed by ``seed``.

    Args:
        size: samples of the training set.
        seed: seed of the run.
        amount: a number of samples, above 1 also as a float, or a fraction below 1; None = 10 %, at most 5000.
        labels: class of each sample, for a part with the same number of each class, the amount rounded down; None = the
            classes do not matter.

    Returns:
        Positions in the training set.

    Raises:
        ValueError: if nothing would be left to train on, or too little of a class.
    """
    if amount is None:
        count = min(int(size * HELD_OUT_SHARE), HELD_OUT_MOST)
    else:
        is_count = isinstance(amount, int) or amount > 1
        if not 0 <= amount < size or (amount % 1 if is_count else amount == 1):  # 1.0 could mean either
            raise ValueError(
                f"held_out {amount}: give a number of samples below the {size} of the training set, or a fraction in "
                "[0, 1)"
            )
        count = int(amount if is_count else size * amount)
    order = permutation(size, seed, _HOLD_OUT)
    if labels is None or not count:
        return order[:count]
    present = np.bincount(labels)
    classes, fewest = int((present > 0).sum()), int(present[present > 0].min())
    each = count // classes
    if not 0 < each < fewest:
        raise ValueError(
            f"held_out {amount}: balanced parts of {count} samples have {each} of each of {classes} classes, and the "
            f"smallest class has {fewest}; give a number from {classes} to {classes * (fewest - 1)}"
        )
    return alternate(order, labels)[: each * classes]
