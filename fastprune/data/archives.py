"""Readers of the formats in which small data sets are published: MNIST's idx.gz and CIFAR-10's binary version."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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


_CIFAR_RECORD = 1 + 3 * 32 * 32  # label, then red, green and blue planes


def read_cifar10(root: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read the binary version of CIFAR-10.

    Args:
        root: folder of ``data_batch_1.bin`` … ``data_batch_5.bin`` and ``test_batch.bin``, or the folder above it.
        part: "train" or "test".

    Returns:
        Images [N, 3, 32, 32], uint8, and labels [N], int64.

    Raises:
        ValueError: if a file is missing, cut off or damaged, or the folder holds the Python version, which is made of
            pickles.
    """
    if (root / "cifar-10-batches-bin").is_dir():
        root = root / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if part == "train" else ["test_batch.bin"]
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        if (root / "cifar-10-batches-py").is_dir() or (root / "data_batch_1").is_file():
            raise ValueError(
                f"{str(root)!r} holds the Python version of CIFAR-10, which is made of pickles and is not read; give "
                "the binary version, cifar-10-binary.tar.gz, unpacked"
            )
        raise ValueError(
            f"{str(root)!r} has no {missing[0]}: give the folder with the content of cifar-10-binary.tar.gz"
        )
    images, labels = [], []
    for name in names:
        content = np.fromfile(root / name, dtype=np.uint8)
        if not content.size or content.size % _CIFAR_RECORD:
            raise ValueError(
                f"{str(root / name)!r}: {content.size} bytes are not a multiple of the {_CIFAR_RECORD} of a record"
            )
        records = torch.from_numpy(content.reshape(-1, _CIFAR_RECORD))
        if int(records[:, 0].max()) > 9:
            raise ValueError(f"{str(root / name)!r}: label {int(records[:, 0].max())} is not one of CIFAR-10's")
        labels.append(records[:, 0].long())
        images.append(records[:, 1:].reshape(-1, 3, 32, 32))
    return torch.cat(images), torch.cat(labels)
