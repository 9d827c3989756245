"""Folders of pictures, one folder per class: ImageNet's layout and preparation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastprune.data.sources import DatasetSource, Samples

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def read_imagefolder(root: Path, image_size: int, workers: int) -> tuple[DatasetSource, DatasetSource, int]:
    """Open ``root/train/CLASS/*.jpg`` and ``root/val/CLASS/*.jpg``.

    Training with augmentation takes a random crop of 8 to 100 % of the picture and flips half of them. Otherwise the
    shorter side is scaled to 8/7 of the crop (256 for 224), and the crop is at the centre.

    Args:
        root: the folder above ``train`` and ``val``.
        image_size: side of the crop in pixels.
        workers: reading processes.

    Returns:
        Training set, test set and the number of classes.

    Raises:
        ValueError: if torchvision or a folder is missing, a class is empty, or the two parts differ in classes.
    """
    try:
        datasets: Any = importlib.import_module("torchvision.datasets")
        transforms: Any = importlib.import_module("torchvision.transforms")
    except ImportError as error:
        raise ValueError(f"data 'imagefolder' needs torchvision: pip install 'fastprune[vision]' ({error})") from error
    finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    plain: Callable[[object], Any] = transforms.Compose(
        [transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size), *finish]
    )
    augmented: Callable[[object], Any] = transforms.Compose(
        [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), *finish]
    )
    parts = {}
    for part in ("train", "val"):
        folder = root / part
        if not folder.is_dir():
            raise ValueError(f"{str(root)!r} has no folder {part!r}: put the pictures into {part}/CLASS/*.jpg")
        try:
            parts[part] = datasets.ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ValueError(f"{str(folder)!r}: {error}") from error
    if parts["train"].classes != parts["val"].classes:
        differing = sorted(set(parts["train"].classes) ^ set(parts["val"].classes))
        raise ValueError(f"{str(root)!r}: 'train' and 'val' have different classes; only one has {differing[:5]}")
    sources = [DatasetSource(Samples(part, plain, augmented), len(part), workers) for part in parts.values()]
    return sources[0], sources[1], len(parts["train"].classes)
