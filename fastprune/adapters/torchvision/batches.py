"""Batches of a detector's loader, as its network takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fastprune.adapters.torchvision.boxes import make_boxes


def read_batches(loader: Iterable[Any], detector: Any, size: tuple[int, int], proposals: int | None) -> Iterable[Any]:
    """Return a loader whose batches are resized and stacked, as ``run_batch`` takes them.

    A ``DataLoader`` stays one, with its sampler, its generator, and its workers, which do this work.

    Args:
        loader: gives batches (images, targets).
        detector: whose mean and deviation of pixels are taken.
        size: height and width of the images.
        proposals: number of boxes for each image; None = no boxes.

    Raises:
        ValueError: for an iterator.
    """
    if isinstance(loader, Iterator):
        raise ValueError("data: an iterator gives its batches once; give a loader, whose __iter__ starts anew")
    prepare = Preparation(detector, size, proposals)
    if not isinstance(loader, DataLoader):
        return Batches(loader, prepare)
    ready: DataLoader[Any] = copy.copy(loader)
    ready.collate_fn = Chain(loader.collate_fn, prepare)
    ready._iterator = None
    return ready


@dataclass
class Chain:
    """Two functions, one after the other; workers get them as a pickle."""

    first: Callable[[Any], Any]
    then: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        """Return what the second makes of what the first makes."""
        return self.then(self.first(samples))


@dataclass
class Batches:
    """Batches of something else than a ``DataLoader``, prepared one by one."""

    loader: Iterable[Any]
    prepare: Callable[[Any], Any]

    def __iter__(self) -> Iterator[Any]:
        """Yield prepared batches."""
        return map(self.prepare, iter(self.loader))

    def __len__(self) -> int:
        """Return the number of batches; TypeError for a loader that does not tell it."""
        if not isinstance(self.loader, Sized):
            raise TypeError("the loader does not tell its number of batches")
        return len(self.loader)


class Preparation:
    """Resizes and stacks the images of a batch, and adds boxes; see ``read_batches``."""

    def __init__(self, detector: Any, size: tuple[int, int], proposals: int | None) -> None:
        self.size, self.proposals = size, proposals
        given = detector.transform
        self.resize = GeneralizedRCNNTransform(
            min(size), max(size), given.image_mean, given.image_std, size_divisible=1, fixed_size=size[::-1]
        ).eval()

    def __call__(self, batch: Any) -> dict[str, Any]:
        """Return "images" [N, 3, H, W], "boxes" [N, K, 4] for an R-CNN, and "targets", a dict of arrays for each."""
        images, targets = batch
        with torch.no_grad():
            stacked, resized = self.resize(list(images), [dict(target) for target in targets])
        ready = {"images": stacked.tensors}
        if self.proposals is not None:
            boxes = [make_boxes(self.proposals, *self.size, target["boxes"].cpu().float()) for target in resized]
            ready["boxes"] = torch.stack(boxes)
        # As arrays, which are cut like images where a part of a batch is taken.
        arrays = [{k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in t.items()} for t in resized]
        return {**ready, "targets": arrays}


def run_batch(network: Any, batch: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Run a network on a batch of ``read_batches``; the target is the batch itself."""
    inputs = [batch[name] for name in ("images", "boxes") if name in batch]
    return network(*inputs), batch
