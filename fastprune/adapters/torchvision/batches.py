"""Batches of a detector's loader, as its network takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fastprune.adapters.torchvision.boxes import make_boxes


class Batches:
    """A loader's batches, with images resized and stacked, as ``run_batch`` takes them.

    Args:
        loader: gives batches (images, targets).
        detector: whose mean and deviation of pixels are taken.
        size: height and width of the images.
        proposals: number of boxes for each image; None = no boxes.
    """

    def __init__(self, loader: Iterable[Any], detector: Any, size: tuple[int, int], proposals: int | None) -> None:
        self.loader, self.size, self.proposals = loader, size, proposals
        given = detector.transform
        self.resize = GeneralizedRCNNTransform(
            min(size), max(size), given.image_mean, given.image_std, size_divisible=1, fixed_size=size[::-1]
        ).eval()
        if isinstance(loader, Iterator):
            raise ValueError("data: an iterator gives its batches once; give a loader, whose __iter__ starts anew")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield "images" [N, 3, H, W], "boxes" [N, K, 4] for an R-CNN, and "targets", a dict of arrays for each."""
        for images, targets in self.loader:
            with torch.no_grad():
                stacked, resized = self.resize(list(images), [dict(target) for target in targets])
            batch = {"images": stacked.tensors}
            if self.proposals is not None:
                boxes = [make_boxes(self.proposals, *self.size, target["boxes"].cpu().float()) for target in resized]
                batch["boxes"] = torch.stack(boxes)
            # As arrays, which are cut like images where a part of a batch is taken.
            arrays = [{k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in t.items()} for t in resized]
            yield {**batch, "targets": arrays}

    def __len__(self) -> int:
        """Return the number of batches; TypeError for a loader that does not tell it."""
        if not isinstance(self.loader, Sized):
            raise TypeError("the loader does not tell its number of batches")
        return len(self.loader)


def run_batch(network: Any, batch: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Run a network on a batch of ``Batches``; the target is the batch itself."""
    inputs = [batch[name] for name in ("images", "boxes") if name in batch]
    return network(*inputs), batch
