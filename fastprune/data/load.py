"""Data sets by the names that users type."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.data.archives import CIFAR10, CIFAR100, read_cifar, read_mnist
from fastprune.data.augment import ShiftAndFlip
from fastprune.data.batches import Indices
from fastprune.data.data import Data, SourceData, held_out_part
from fastprune.data.hf import read_hf
from fastprune.data.imagefolder import MEAN, STD, make_transforms, read_imagefolder
from fastprune.data.nests import first_tensor
from fastprune.data.sources import Source, TensorSource
from fastprune.data.synthetic import SyntheticSource
from fastprune.data.user_data import UserData
from fastprune.host.objects import is_there, load_object
from fastprune.host.spelling import did_you_mean

SPECS = """\
  digits                          scikit-learn's 8x8 digits, 1,797 images
  fashion-mnist:FOLDER            the four idx.gz files
  cifar10:FOLDER                  cifar-10-binary.tar.gz or cifar-10-python.tar.gz, unpacked
  cifar100:FOLDER                 cifar-100-binary.tar.gz or cifar-100-python.tar.gz, unpacked
  imagefolder:FOLDER              FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg
  hf:FOLDER_OR_NAME               image data set of the package 'datasets'
  yolo:FILE.yaml                  Ultralytics' data sets, for its networks, in commands; a folder for classification
  file.py:function                your function that returns a loader, or (train, held out), or a UserData
  package.module:function         the same, by import
  synthetic:CxHxW:CLASSES[:SIZE]  made images, 4,096 unless told"""

Labelled = tuple[Tensor, Tensor]


def load_data(
    spec: str,
    *,
    seed: int = 0,
    held_out: int | float | None = None,
    image_size: int | None = None,
    workers: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    balanced: bool = False,
) -> Data:
    """Open a data set; nothing is downloaded, except by ``hf:`` for names on the Hugging Face hub.

    Args:
        spec: one of ``SPECS``.
        seed: seed of the run, which chooses the held-out part. The test set never depends on it.
        held_out: amount of the training set that is held out; see ``held_out_part``.
        image_size: side of the images in pixels; None = the data set's own (224 for folders of pictures).
        workers: processes that read pictures; None = one per core that this process may use, at most 8.
        mean: mean of each channel that is subtracted, for pixels from 0 to 1; None = that of the training set (of
            ImageNet for folders of pictures).
        std: standard deviation of each channel, by which pixels are then divided.
        balanced: whether the held-out part and other random samples have the same number of images of each class.

    Returns:
        The data set.

    Raises:
        ValueError: for an unknown spec, or files that are missing or damaged; the message says what is needed.

    >>> load_data("digits").shape
    (1, 8, 8)
    """
    kind, _, argument = spec.partition(":")
    scale, part = Scale.of(mean, std), Part(seed, held_out, balanced)
    if kind == "synthetic":
        return _synthetic(spec, part, image_size, scale)
    if kind == "digits" and not argument:
        return _in_memory(
            spec,
            *_digits(),
            16.0,
            ShiftAndFlip(1, flip=False),
            part,
            scale=scale,
            image_size=image_size,
        )
    if kind in PICTURES:
        size, readers = image_size or 224, default_workers() if workers is None else workers
        root = argument if kind == "hf" else str(_folder(spec, argument))
        scale = scale or IMAGENET
        train, test, classes = PICTURES[kind](root, make_transforms(kind, size, *scale.values), readers)
        train = replace(train, pixel_std=scale.std)
        return SourceData(spec, (3, size, size), classes, train, test, *part.of(train))
    if kind in ARCHIVES:
        root_of, white = _folder(spec, argument), 255.0
        both = ARCHIVES[kind](root_of, "train"), ARCHIVES[kind](root_of, "test")
        return _in_memory(spec, *both, white, ShiftAndFlip(4, flip=True), part, scale=scale, image_size=image_size)
    if kind == "yolo":
        raise ValueError(
            f"data {spec!r}: only commands take them; in Python, give data={argument!r} to adapters.yolo.prune"
        )
    if is_there(spec):
        options = {"held_out": held_out, "image_size": image_size, "mean": mean, "std": std, "balanced": balanced}
        return _from_factory(spec, options)
    raise ValueError(f"data {spec!r} is unknown{_hint(kind)}; give one of\n{SPECS}")


PICTURES = {"imagefolder": read_imagefolder, "hf": read_hf}
ARCHIVES: dict[str, Callable[[Path, str], Labelled]] = {
    "fashion-mnist": lambda root, part: read_mnist(root, "train" if part == "train" else "t10k"),
    "cifar10": partial(read_cifar, CIFAR10),
    "cifar100": partial(read_cifar, CIFAR100),
}


def _hint(kind: str) -> str:
    return did_you_mean(kind, ["synthetic", "digits", *PICTURES, *ARCHIVES], " ({})", show=str)


def _folder(spec: str, argument: str) -> Path:
    root = Path(argument).expanduser()
    if not argument or not root.is_dir():
        raise ValueError(f"data {spec!r}: {argument!r} is no folder; give one of\n{SPECS}")
    return root


@dataclass(frozen=True)
class Part:
    """The choice of held-out samples.

    Args:
        seed: seed of the run.
        amount: as for ``held_out_part``.
        balanced: whether random samples have the same number of each class.
    """

    seed: int
    amount: int | float | None
    balanced: bool

    def of(self, train: Source) -> tuple[Indices, Indices | None]:
        """Return the held-out positions in a training set, and its labels where classes are balanced."""
        labels = train.labels_of_all() if self.balanced else None
        return held_out_part(len(train), self.seed, self.amount, labels), labels


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of channels, for pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(mean: Sequence[float] | None, std: Sequence[float] | None) -> Scale | None:
        """Return the scale that a user gives; None for none.

        Raises:
            ValueError: if one of both is missing, they differ in length, or a deviation is not above 0.
        """
        if not mean and not std:
            return None
        if not mean or not std or len(mean) != len(std):
            raise ValueError(f"mean {mean}, std {std}: both are needed, with one number for each channel")
        if not all(value > 0 for value in std):
            raise ValueError(f"std {std}: numbers above 0 are needed, for pixels from 0 to 1")
        return Scale(tuple(map(float, mean)), tuple(map(float, std)))

    @property
    def values(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation."""
        return self.mean, self.std

    def tensors(self, channels: int, white: float) -> tuple[Tensor, Tensor]:
        """Return both in units of bytes, for images whose white is ``white``.

        Raises:
            ValueError: for another number of channels.
        """
        if len(self.mean) != channels:
            raise ValueError(f"mean {list(self.mean)}: the images have {channels} channel(s); give as many numbers")
        return torch.tensor(self.mean) * white, torch.tensor(self.std) * white


IMAGENET = Scale(MEAN, STD)


def _from_factory(spec: str, options: Mapping[str, object]) -> Data:
    """Return the data that a user's function makes: a ``Data``, a loader, or two or three of them."""
    given = [name for name, value in options.items() if value]
    if given:
        raise ValueError(f"{given[0]}: the function {spec!r} makes the data as it wants; change it there")
    factory = load_object(spec, "data")
    made = factory() if callable(factory) else factory
    if isinstance(made, Data):
        return made
    loaders = made if isinstance(made, tuple) and 2 <= len(made) <= 3 and not _is_batches(made) else (made,)
    parts = dict(zip(("train", "held_out", "test"), loaders, strict=False))
    for name, loader in parts.items():
        if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, str, Mapping)):
            raise ValueError(
                f"data {spec!r}: returned a {type(loader).__name__} as {name}; a loader, a pair (train, held out), "
                "three of them (with test) or a fastprune.UserData is needed"
            )
    return UserData(parts["train"], held_out=parts.get("held_out"), test=parts.get("test"), name=spec)


def _is_batches(made: tuple[object, ...]) -> bool:
    """Return whether a tuple is a loader itself: its elements are batches, not loaders."""
    return any(isinstance(part, (tuple, Mapping)) and first_tensor(part) is not None for part in made)


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
    part: Part,
    *,
    scale: Scale | None,
    image_size: int | None,
) -> SourceData:
    resize: Callable[[Tensor], Tensor] = lambda images: images  # noqa: E731
    if image_size is not None:
        resize = lambda images: _resize(images, image_size, white)  # noqa: E731
    images, labels = resize(train[0]), train[1]
    if scale is not None:
        mean, std = scale.tensors(images.shape[1], white)
    else:  # of the training images, in float64
        pixels = images.double().transpose(0, 1).flatten(1)
        mean, std = pixels.mean(1).float(), pixels.std(1).float()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    source = TensorSource(images, labels, mean, std, augmentation)
    return SourceData(
        name,
        shape,
        int(torch.maximum(labels.max(), test[1].max())) + 1,
        source,
        TensorSource(resize(test[0]), test[1], mean, std),
        *part.of(source),
    )


def _resize(images: Tensor, size: int, white: float) -> Tensor:
    scaled = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, white).to(torch.uint8)


def _synthetic(spec: str, part: Part, image_size: int | None, scale: Scale | None) -> SourceData:
    if scale is not None:
        raise ValueError(f"mean, std: {spec!r} has no pixels from 0 to 1; leave them out")
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
    return SourceData(spec, shape, classes, train, test, *part.of(train))


def default_workers() -> int:
    """Return the number of processes that read pictures: one per core that this process may use, at most 8."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(len(os.sched_getaffinity(0)) // local, 8)
