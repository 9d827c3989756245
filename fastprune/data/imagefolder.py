"""Folders of pictures, one folder per class: ImageNet's layout and preparation."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastprune.data.sources import DatasetSource, Samples

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


Transform = Callable[[object], Any]
Transforms = tuple[Transform, Transform]
"""Transforms of pictures: without, and with augmentation."""


def make_transforms(kind: str, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Transforms:
    """Return the preparation of pictures.

    Training with augmentation takes a random crop of 8 to 100 % of the picture and flips half of them. Otherwise the
    shorter side is scaled to 8/7 of the crop (256 for 224), and the crop is at the centre.

    Args:
        kind: what the user typed, for messages.
        image_size: side of the crop in pixels.
        mean: mean of each of three channels, for pixels from 0 to 1.
        std: standard deviation of each channel.

    Raises:
        ValueError: if torchvision is missing, or there are not three channels.
    """
    try:
        transforms: Any = importlib.import_module("torchvision.transforms")
    except ImportError as error:
        raise ValueError(f"data {kind!r} needs torchvision: pip install 'fastprune[vision]' ({error})") from error
    if len(mean) != 3:
        raise ValueError(f"mean {list(mean)}: pictures have 3 channels; give as many numbers")
    finish = [transforms.ToTensor(), transforms.Normalize(tuple(mean), tuple(std))]
    plain: Transform = transforms.Compose(
        [transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size), *finish]
    )
    augmented: Transform = transforms.Compose(
        [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), *finish]
    )
    return plain, augmented


def read_imagefolder(root: str, prepare: Transforms, workers: int) -> tuple[DatasetSource, DatasetSource, int]:
    """Open ``root/train/CLASS/*.jpg`` and ``root/val/CLASS/*.jpg``.

    Args:
        root: the folder above ``train`` and ``val``.
        prepare: the preparation of pictures.
        workers: reading processes.

    Returns:
        Training set, test set and the number of classes.

    Raises:
        ValueError: if a folder is missing, a class is empty, or the two parts differ in classes.
    """
    datasets: Any = importlib.import_module("torchvision.datasets")
    parts = {}
    for part in ("train", "val"):
        folder = Path(root) / part
        if not folder.is_dir():
            raise ValueError(f"{root!r} has no folder {part!r}: put the pictures into {part}/CLASS/*.jpg")
        try:
            parts[part] = datasets.ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ValueError(f"{str(folder)!r}: {error}") from error
    if parts["train"].classes != parts["val"].classes:
        differing = sorted(set(parts["train"].classes) ^ set(parts["val"].classes))
        raise ValueError(f"{root!r}: 'train' and 'val' have different classes; only one has {differing[:5]}")
    sources = [DatasetSource(Samples(part, *prepare), len(part), workers) for part in parts.values()]
    return sources[0], sources[1], len(parts["train"].classes)
