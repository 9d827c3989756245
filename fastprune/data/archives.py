"""Readers of the formats in which small data sets are published: MNIST's idx.gz, CIFAR's binary and Python versions."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastprune.data.plain_pickle import read_plain_pickle

_IDX_BYTES = 0x08  # idx type code of unsigned bytes, the only one in use


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read one gzip-compressed idx file of unsigned bytes.

    The format: two zero bytes, the type code, the number of dimensions, each dimension as a big-endian 32-bit integer,
    then the values.

    Args:
        path: the ``.gz`` file.
        dimensions: number of dimensions that the file must have: 3 for images, 1 for labels.

    Returns:
        uint8 tensor of the shape that the file states.

    Raises:
        ValueError: if the file is missing, cut off, or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r}: there is no such file") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r}: not a whole gzip file ({error}); get it again") from error
    magic = bytes((0, 0, _IDX_BYTES, dimensions))
    if content[:4] != magic:
        raise ValueError(
            f"{str(path)!r}: starts with {content[:4].hex()}, but an idx file of bytes in {dimensions} dimension(s) "
            f"starts with {magic.hex()}"
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise ValueError(f"{str(path)!r}: ends within its header of {header} bytes")
    shape = tuple(int(n) for n in np.frombuffer(content[4:header], dtype=">u4"))
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{str(path)!r}: states the shape {shape}, but holds {len(content) - header} values")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


def read_mnist(root: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read images and labels of an MNIST-like set.

    Args:
        root: folder of the four idx.gz files.
        part: "train" or "t10k".

    Returns:
        Images [N, 1, H, W], uint8, and labels [N], int64.

    Raises:
        ValueError: as ``read_idx``, or if the numbers of images and labels differ.
    """
    images = read_idx(root / f"{part}-images-idx3-ubyte.gz", 3)
    labels = read_idx(root / f"{part}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{str(root)!r}: {len(images)} {part} images, but {len(labels)} labels")
    return images[:, None], labels.long()


@dataclass(frozen=True)
class Cifar:
    """How one of the CIFAR sets is published.

    Args:
        name: the name.
        classes: number of classes.
        binary: the folder of the binary version, and its files for training and test.
        python: the folder of the Python version, and its files.
        header: bytes before the pixels of a record of the binary version; the last one is the label.
        labels: key of the labels in the Python version.
    """

    name: str
    classes: int
    binary: tuple[str, Sequence[str], Sequence[str]]
    python: tuple[str, Sequence[str], Sequence[str]]
    header: int
    labels: str


CIFAR10 = Cifar(
    "CIFAR-10", 10,
    ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
    ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
    1, "labels",
)  # fmt: skip
CIFAR100 = Cifar(
    "CIFAR-100", 100, ("cifar-100-binary", ["train.bin"], ["test.bin"]), ("cifar-100-python", ["train"], ["test"]),
    2, "fine_labels",
)  # fmt: skip

_PIXELS = 3 * 32 * 32  # red, green and blue planes


def read_cifar(kind: Cifar, root: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read the binary or the Python version of CIFAR; nothing is unpickled.

    Args:
        kind: which set.
        root: folder of the files, or the folder above it.
        part: "train" or "test".

    Returns:
        Images [N, 3, 32, 32], uint8, and labels [N], int64.

    Raises:
        ValueError: if a file is missing, cut off or damaged.
    """
    for (folder, *files), read in ((kind.binary, _read_binary), (kind.python, _read_python)):
        home = root / folder if (root / folder).is_dir() else root
        names = files[0 if part == "train" else 1]
        if all((home / name).is_file() for name in names):
            batches = [read(kind, home / name) for name in names]
            return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    number = kind.name.lower()
    home = root / kind.binary[0] if (root / kind.binary[0]).is_dir() else root
    missing = [name for name in kind.binary[1 if part == "train" else 2] if not (home / name).is_file()]
    raise ValueError(
        f"{str(home)!r} has no {missing[0]}: give the folder with "
        f"the content of {number}-binary.tar.gz or {number}-python.tar.gz"
    )


def _read_binary(kind: Cifar, path: Path) -> tuple[Tensor, Tensor]:
    content, size = np.fromfile(path, dtype=np.uint8), kind.header + _PIXELS
    if not content.size or content.size % size:
        raise ValueError(f"{str(path)!r}: {content.size} bytes are not a multiple of the {size} of a record")
    records = torch.from_numpy(content.reshape(-1, size))
    return records[:, kind.header :].reshape(-1, 3, 32, 32), _check_labels(kind, path, records[:, kind.header - 1])


def _read_python(kind: Cifar, path: Path) -> tuple[Tensor, Tensor]:
    values = read_plain_pickle(path)
    items = values.items() if isinstance(values, dict) else ()
    known = {key.decode() if isinstance(key, bytes) else key: value for key, value in items}
    images, labels = known.get("data"), known.get(kind.labels)
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != _PIXELS:
        raise ValueError(f"{str(path)!r}: no array 'data' of {_PIXELS} bytes per image; get the file again")
    if not isinstance(labels, list) or len(labels) != len(images):
        raise ValueError(f"{str(path)!r}: no list {kind.labels!r} of a label for each image; get the file again")
    return torch.from_numpy(images).reshape(-1, 3, 32, 32), _check_labels(kind, path, torch.tensor(labels))


def _check_labels(kind: Cifar, path: Path, labels: Tensor) -> Tensor:
    if int(labels.max()) >= kind.classes or int(labels.min()) < 0:
        raise ValueError(f"{str(path)!r}: label {int(labels.max())} is not one of {kind.name}'s")
    return labels.long()
