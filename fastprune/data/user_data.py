"""A user's own loaders as data: anything that can be iterated repeatedly for batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from fastprune.data.batches import BatchRequest, Split, share_of, torch_seed
from fastprune.data.data import Data
from fastprune.data.nests import count_samples, first_tensor, take
from fastprune.data.sources import Batch
from fastprune.host.distributed import Distributed

Loader = Iterable[Any]
"""Anything that can be iterated repeatedly for batches: a ``DataLoader``, a list of batches, …"""


_END = object()  # after the last batch


class UserData(Data):
    """A user's loaders, with their own batch size, order and augmentation.

    Each pass runs with torch's generator seeded by (seed, epoch). So a ``DataLoader`` that shuffles and augments by
    torch's generator gives the same batches when a run is resumed; those before ``start`` are read and dropped.
    Workers start anew for each pass, even if they would persist. Under N processes each takes its share of every batch,
    unless the loader has a ``DistributedSampler``, which divides the samples itself.

    Args:
        train: training batches of images [N, C, H, W] and labels [N]; other batches (several inputs before the target,
            dicts, …) for an objective that takes them. No iterator: each epoch starts anew.
        held_out: batches of the training set that are not in ``train``, for methods that compare candidates.
        test: test batches, for ``evaluate``.
        num_classes: number of classes, for methods that need it.
        name: name in reports.
        image: (C, H, W), if a batch that ``forward`` takes apart gives the network images [N, C, H, W] of this size and
            nothing else; None = found in the first batch.

    Raises:
        ValueError: for an iterator in place of an iterable, an empty ``train``, or batches without tensors.
    """

    def __init__(
        self,
        train: Loader,
        *,
        held_out: Loader | None = None,
        test: Loader | None = None,
        num_classes: int | None = None,
        name: str = "user",
        image: tuple[int, int, int] | None = None,
    ) -> None:
        self._loaders: dict[Split, Loader | None] = {"train": train, "held_out": held_out, "test": test}
        for split, loader in self._loaders.items():
            if isinstance(loader, Iterator):
                raise ValueError(
                    f"{split} data is an iterator, which gives its batches only once; give a DataLoader, a list of "
                    "batches or another object whose __iter__ starts anew"
                )
        first = next(iter(train), None)
        if first is None:
            raise ValueError("train data is empty: at least one batch is needed")
        self.first = as_batch(first)
        count_samples(self.first)
        inputs = first_tensor(self.first)
        assert inputs is not None
        self.name = name
        self.shape = image or tuple(inputs.shape[1:])
        self.gives_images = image is not None
        self._num_classes = num_classes

    @property
    def knows_classes(self) -> bool:
        """Whether the user told the number of classes."""
        return self._num_classes is not None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        if self._num_classes is None:
            raise ValueError("the number of classes is not known: give UserData(loader, num_classes=…)")
        return self._num_classes

    def size(self, split: Split) -> int:
        """Return the number of samples in ``split``; 0 if there is no such part."""
        loader = self._loaders[split]
        if loader is None:
            return 0
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized):
            return len(loader.dataset)
        return sum(map(count_samples, loader))

    def steps(
        self,
        split: Split,
        batch_size: int,
        *,
        samples: int | None = None,
        distributed: Distributed | None = None,
    ) -> int:
        """Return the number of batches in one epoch of training."""
        loader = self._loader(split)
        if samples is None and isinstance(loader, Sized):
            return len(loader)
        return sum(1 for _ in self.read(BatchRequest(split, batch_size, samples=samples)))

    def read(self, request: BatchRequest) -> Iterator[Batch]:
        """Read the batches of ``request``.

        The loader decides batch size, order and augmentation. If ``samples`` are limited, they are the first ones of a
        pass that is the same in every epoch.
        """
        peers = request.distributed
        loader = self._loader(request.split)
        epoch = request.epoch if request.samples is None else 0
        sampler = loader.sampler if isinstance(loader, DataLoader) else None
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        remaining = request.samples
        given = 0
        for whole in _iterate(loader, torch_seed(request.seed, epoch)):
            batch, size = as_batch(whole), count_samples(whole)
            if remaining is not None:
                if remaining <= 0:
                    return
                batch, size = take(batch, slice(remaining), size), min(size, remaining)
                remaining -= size
            if not isinstance(sampler, DistributedSampler):
                if size < peers.world_size and not request.complete:
                    continue
                share = share_of(size, peers)
                batch, size = take(batch, share, size), len(range(*share.indices(size)))
            if given >= request.start and size:
                yield batch
            given += 1

    def _loader(self, split: Split) -> Loader:
        loader = self._loaders[split]
        if loader is None:
            raise ValueError(f"there is no {split} data: give UserData(loader, {split}=…)")
        return loader


def as_batch(batch: Any) -> Batch:
    """Return the inputs and the targets of a pair; of any other batch the whole, and None, see ``Objective.run``."""
    return (batch[0], batch[1]) if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)


def _iterate(loader: Loader, seed: int) -> Iterator[Any]:
    """Yield one pass of ``loader`` with its own stream of torch's default generator, whose state stays as it was."""
    if isinstance(loader, DataLoader):
        if loader.persistent_workers:
            # Persistent workers keep their own random numbers and serve one pass at a time: this pass gets new workers.
            fresh: DataLoader[Any] = copy.copy(loader)
            fresh._iterator = None
            loader = fresh
        if loader.generator is not None:
            loader.generator.manual_seed(seed)
    state = torch.Generator().manual_seed(seed).get_state()
    iterator: Iterator[Any] | None = None
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            if iterator is None:
                iterator = iter(loader)
            batch = next(iterator, _END)
            state = torch.get_rng_state()
        if batch is _END:
            return
        yield batch
