"""Nests: tensors in tuples, lists and dicts, as loaders give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def map_tensors(change: Callable[[Tensor], Tensor], nest: T) -> T:
    """Return a nest with each tensor changed; values of other kinds stay."""
    value: Any = nest
    if isinstance(value, Tensor):
        value = change(value)
    elif isinstance(value, Mapping):
        value = {name: map_tensors(change, item) for name, item in value.items()}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        value = type(value)(*(map_tensors(change, item) for item in value))
    elif isinstance(value, (tuple, list)):
        value = type(value)(map_tensors(change, item) for item in value)
    return value  # type: ignore[no-any-return]


def first_tensor(nest: object) -> Tensor | None:
    """Return the first tensor of a nest; None if it has none."""
    if isinstance(nest, Tensor):
        return nest
    items = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, (tuple, list)) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def count_samples(nest: object) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor.

    Raises:
        ValueError: for a batch without tensors, or with a first one that has no dimension.
    """
    tensor = first_tensor(nest)
    if tensor is None or tensor.dim() == 0:
        raise ValueError("data: a batch has no tensor with a dimension of samples; give batches of tensors")
    return len(tensor)


def take(nest: T, samples: slice, size: int) -> T:
    """Return some samples of a batch.

    Args:
        nest: the batch.
        samples: the samples.
        size: the number of samples in the batch: tensors of this length, and lists of this length that hold no tensors
            (file names, say), are cut; all else stays.
    """
    value: Any = nest
    if isinstance(value, Tensor):
        value = value[samples] if value.dim() and len(value) == size else value
    elif isinstance(value, Mapping):
        value = {name: take(item, samples, size) for name, item in value.items()}
    elif isinstance(value, (tuple, list)) and len(value) == size and first_tensor(value) is None:
        value = value[samples]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        value = type(value)(*(take(item, samples, size) for item in value))
    elif isinstance(value, (tuple, list)):
        value = type(value)(take(item, samples, size) for item in value)
    return value  # type: ignore[no-any-return]
