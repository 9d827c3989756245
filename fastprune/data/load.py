"""Data sets by the names that users type."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.data.archives import read_cifar10, read_mnist
from fastprune.data.augment import ShiftAndFlip
from fastprune.data.data import SourceData, held_out_part
from fastprune.data.imagefolder import read_imagefolder
from fastprune.data.sources import TensorSource
from fastprune.data.synthetic import SyntheticSource

SPECS = """\
  digits                          scikit-learn's 8x8 digits, 1,797 images
  fashion-mnist:FOLDER            the four idx.gz files
  cifar10:FOLDER                  cifar-10-binary.tar.gz, unpacked
  imagefolder:FOLDER              FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg
  synthetic:CxHxW:CLASSES[:SIZE]  made images, 4,096 unless told"""

Labelled = tuple[Tensor, Tensor]


def load_data(
    spec: str,
    *,
    seed: int = 0,
    held_out: int | float | None = None,
    image_size: int | None = None,
    workers: int | None = None,
) -> SourceData:
    """Open a data set; nothing is downloaded.

    Args:
        spec: one of ``SPECS``.
        seed: seed of the run, which chooses the held-out part. The test set never depends on it.
        held_out: amount of the training set that is held out; see ``held_out_part``.
        image_size: side of the images in pixels; None = the data set's own (224 for imagefolder).
        workers: processes that read pictures; None = one per core that this process may use, at most 8.

    Returns:
        The data set.

    Raises:
        ValueError: for an unknown spec, or files that are missing or damaged; the message says what is needed.

    >>> load_data("digits").shape
    (1, 8, 8)
    """
    kind, _, argument = spec.partition(":")
    if kind == "synthetic":
        return _synthetic(spec, seed, held_out, image_size)
    if kind == "digits" and not argument:
        return _in_memory(spec, *_digits(), 16.0, ShiftAndFlip(1, flip=False), seed, held_out, image_size)
    if kind not in ("fashion-mnist", "cifar10", "imagefolder"):
        raise ValueError(f"data {spec!r} is unknown; give one of\n{SPECS}")
    root = Path(argument).expanduser()
    if not argument or not root.is_dir():
        raise ValueError(f"data {spec!r}: {argument!r} is no folder; give one of\n{SPECS}")
    if kind == "imagefolder":
        size = image_size or 224
        train, test, classes = read_imagefolder(root, size, _default_workers() if workers is None else workers)
        return SourceData(spec, (3, size, size), classes, train, test, held_out_part(len(train), seed, held_out))
    read, parts = (read_mnist, ("train", "t10k")) if kind == "fashion-mnist" else (read_cifar10, ("train", "test"))
    both = (read(root, parts[0]), read(root, parts[1]))
    return _in_memory(spec, *both, 255.0, ShiftAndFlip(4, flip=True), seed, held_out, image_size)


def _digits() -> tuple[Labelled, Labelled]:
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
        selection: Any = importlib.import_module("sklearn.model_selection")
    except ImportError as error:
        raise ValueError(f"data 'digits' needs scikit-learn: pip install 'fastprune[demo]' ({error})") from error
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]  # whole numbers from 0 to 16
    labels = torch.from_numpy(bunch.target).long()
    train, test = selection.train_test_split(range(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test])


def _in_memory(
    name: str,
    train: Labelled,
    test: Labelled,
    white: float,
    augmentation: ShiftAndFlip,
    seed: int,
    held_out: int | float | None,
    image_size: int | None,
) -> SourceData:
    resize: Callable[[Tensor], Tensor] = lambda images: images  # noqa: E731
    if image_size is not None:
        resize = lambda images: _resize(images, image_size, white)  # noqa: E731
    images, labels = resize(train[0]), train[1]
    # Mean and standard deviation of each channel of the training images, in float64.
    pixels = images.double().transpose(0, 1).flatten(1)
    mean, std = pixels.mean(1).float(), pixels.std(1).float()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return SourceData(
        name,
        shape,
        int(torch.maximum(labels.max(), test[1].max())) + 1,
        TensorSource(images, labels, mean, std, augmentation),
        TensorSource(resize(test[0]), test[1], mean, std),
        held_out_part(len(images), seed, held_out),
    )


def _resize(images: Tensor, size: int, white: float) -> Tensor:
    scaled = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, white).to(torch.uint8)


def _synthetic(spec: str, seed: int, held_out: int | float | None, image_size: int | None) -> SourceData:
    match = re.fullmatch(r"synthetic:(\d+)x(\d+)x(\d+):(\d+)(?::(\d+))?", spec)
    if match is None:
        raise ValueError(f"data {spec!r}: write synthetic:CxHxW:CLASSES or synthetic:CxHxW:CLASSES:SIZE")
    channels, height, width, classes, size = (int(field or 4096) for field in match.groups())
    if image_size is not None:
        height = width = image_size
    if min(channels, height, width, classes, size) < 1:
        raise ValueError(f"data {spec!r}: every number must be at least 1")
    shape = (channels, height, width)
    tests = max(size // 4, 1)
    train = SyntheticSource.make(shape, classes, 0, size, seed=0)
    test = SyntheticSource.make(shape, classes, size, tests, seed=0)
    return SourceData(spec, shape, classes, train, test, held_out_part(size, seed, held_out))


def _default_workers() -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(len(os.sched_getaffinity(0)) // local, 8)
