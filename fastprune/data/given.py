"""Data as users give them to functions: a data set, the name of one, or their own loaders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastprune.data.data import Data
from fastprune.data.load import load_data
from fastprune.data.user_data import Loader, UserData

GivenData = Data | Loader | str
"""A ``Data``, the name of a data set (see ``load_data``), a loader, or two loaders: for training, and held out."""


def as_data(data: object, held_out: object = None, *, seed: int = 0) -> Data | None:
    """Return the data that a user gives; None for None.

    Args:
        data: a ``GivenData``, or None.
        held_out: with loaders, one of held-out samples; with the name of a data set, the part that is held out.
        seed: seed of the run, which chooses the held-out part of a data set.

    Raises:
        ValueError: for data of another kind; says what to give.
    """
    if data is None:
        if held_out is not None:
            raise ValueError("held_out: there is no data= beside it; give the training data too")
        return None
    if isinstance(data, Data):
        if held_out is not None:
            raise ValueError("held_out: this data set holds out a part of its own; leave held_out= out")
        return data
    if isinstance(data, str):
        if held_out is not None and (not isinstance(held_out, (int, float)) or isinstance(held_out, bool)):
            raise ValueError(f"held_out {held_out!r}: beside the name of a data set a number or fraction is needed")
        return load_data(data, seed=seed, held_out=held_out)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, DataLoader) for part in data):
        if held_out is not None:
            raise ValueError("held_out: data= is a pair already, for training and held out; give one of them")
        data, held_out = data
    return UserData(require_loader("data", data), held_out=require_held_out(held_out))


def note_data(data: object, held_out: object = None) -> dict[str, Any]:
    """Return settings by which commands find data again that were given by name; none for others.

    Args:
        data: what was given to a function as its data.
        held_out: the part that is held out.
    """
    if not isinstance(data, str):
        return {}
    file, _, function = data.rpartition(":")
    name = f"{Path(file).expanduser().absolute()}:{function}" if file.endswith(".py") else data
    return {"data": name, "held_out": held_out}


def require_held_out(loader: object) -> Loader | None:
    """Return a loader of held-out samples, checked."""
    return None if loader is None else require_loader("held_out", loader)


def require_loader(name: str, loader: object) -> Loader:
    """Return a loader; refuse what cannot be one.

    Raises:
        ValueError: says what to give.
    """
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ValueError(
            f"{name}: got the data set {type(loader).__name__}, which gives single samples; give a loader of batches: "
            "DataLoader(dataset, batch_size=64, shuffle=True)"
        )
    if isinstance(loader, (Tensor, Mapping, str)) or not isinstance(loader, Iterable):
        raise ValueError(
            f"{name}: got {type(loader).__name__}; a DataLoader or another iterable of batches is needed, or the name "
            "of a data set such as 'cifar10:FOLDER'"
        )
    return loader
