"""The dtypes that operators take, and checks that they share."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def vector_dtype(x: Tensor) -> torch.dtype:
    """The dtype of vectors over the channels of x: float32 unless x is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_floats(name: str, x: Tensor) -> None:
    """Refuse a tensor of another dtype than ``FLOATS``."""
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {dtype_name(x.dtype)}, needs one of {', '.join(map(dtype_name, FLOATS))}")


def check_vector(name: str, value: Tensor, x: Tensor, length: int) -> Tensor:
    """Return ``value`` ``[length]`` in the dtype of vectors over the channels of x.

    Raises:
        TypeError: It is no dense tensor, or of another dtype than x and the vectors of x.
        ValueError: It has another shape, or is on another device.
    """
    check_tensor(name, value, x)
    dtype = vector_dtype(x)
    if value.dtype not in (dtype, x.dtype):
        names = " or ".join(dict.fromkeys((dtype_name(x.dtype), dtype_name(dtype))))
        raise TypeError(f"{name}: got dtype {dtype_name(value.dtype)}, needs {names}")
    if value.shape != (length,):
        raise ValueError(f"{name}: got shape {list(value.shape)}, needs [{length}] (one number for each channel)")
    return value if value.dtype == dtype else value.to(dtype)  # to() costs a microsecond even where it does nothing


def check_tensor(name: str, value: object, x: Tensor | None = None) -> None:
    """Refuse anything but a dense tensor, and one on another device than x."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got an object of type {type(value).__name__}, needs a tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {value.layout}, needs a dense one")
    if x is not None and value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, needs one on {x.device}, where x is")


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
