"""What ``masked_conv_bn_act`` asks of its arguments before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprune.ops.conv.library import Geometry

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def vector_dtype(x: Tensor) -> torch.dtype:
    """The dtype of vectors over the channels of x: float32 unless x is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def geometry_of(
    stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int], groups: int
) -> Geometry:
    """The geometry that these numbers describe."""
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: got {groups!r}, needs an integer >= 1")
    return Geometry(pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1), groups)


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """One number for both directions, or one for each."""
    numbers = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(numbers) != 2 or not all(isinstance(n, int) and least <= n < 2**31 for n in numbers):
        raise ValueError(f"{name}: got {value!r}, needs an integer >= {least} and below 2^31, or two of them")
    return numbers[0], numbers[1]


def check_images(x: Tensor, weight: Tensor, geometry: Geometry, open_in: int | None = None) -> None:
    """Refuse what is no convolution of images; x may lack the channels behind the first ``open_in``."""
    check_tensor("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got dtype {short(x.dtype)}, needs one of {', '.join(map(short, FLOATS))}")
    check_tensor("weight", weight, x)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: got dtype {short(weight.dtype)}, needs {short(x.dtype)}, that of x")
    if x.dim() != 4:
        raise ValueError(f"x: got shape {list(x.shape)}, needs [N, C, H, W]")
    if weight.dim() != 4 or min(weight.shape[2:]) < 1 or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight: got shape {list(weight.shape)}, needs [K, C / groups, R, S]")
    if weight.shape[0] % geometry.groups:
        raise ValueError(f"groups: got {geometry.groups}, needs a divisor of the {weight.shape[0]} rows of weight")
    if x.shape[1] not in (weight.shape[1] * geometry.groups, open_in):
        raise ValueError(
            f"x: got {x.shape[1]} channels, needs {weight.shape[1] * geometry.groups}: "
            f"{weight.shape[1]} columns of weight in {geometry.groups} group(s)"
        )
    if min(geometry.output_size(x.shape, weight.shape)[2:]) < 1:
        raise ValueError(
            f"x: got {x.shape[2]} x {x.shape[3]} pixels, needs at least what the kernel of "
            f"{weight.shape[2]} x {weight.shape[3]}, dilated and less the padding, spans"
        )


def check_residual(residual: Tensor, x: Tensor, size: list[int]) -> None:
    """Refuse a residual that cannot be added to a result of that size."""
    check_tensor("residual", residual, x)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: got dtype {short(residual.dtype)}, needs {short(x.dtype)}, that of x")
    if list(residual.shape) != size:
        raise ValueError(f"residual: got shape {list(residual.shape)}, needs {size}, that of the result")


def vector(name: str, value: Tensor, length: int, x: Tensor) -> Tensor:
    """``value`` ``[length]`` in the dtype of vectors over channels of x."""
    check_tensor(name, value, x)
    if value.dtype not in (x.dtype, vector_dtype(x)):
        names = " or ".join(dict.fromkeys((short(x.dtype), short(vector_dtype(x)))))
        raise TypeError(f"{name}: got dtype {short(value.dtype)}, needs {names}")
    if list(value.shape) != [length]:
        raise ValueError(f"{name}: got shape {list(value.shape)}, needs [{length}] (one for each output channel)")
    return value.to(vector_dtype(x))


def frozen_affine(
    bn: tuple[Tensor | None, Tensor | None, Tensor, Tensor] | None,
    bias: Tensor | None,
    eps: float,
    length: int,
    x: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift ``[K]`` that stand for the convolution's bias and a batch norm in eval mode."""
    offset = None if bias is None else vector("bias", bias, length, x)
    if bn is None:
        return None, offset
    if not isinstance(bn, (tuple, list)) or len(bn) != 4:
        raise ValueError("bn: needs (weight, bias, running_mean, running_var), or None")
    gamma, beta, mean, variance = (
        None if value is None else vector(f"bn[{place}]", value, length, x) for place, value in enumerate(bn)
    )
    if mean is None or variance is None:
        raise ValueError("bn: got no running statistics, needs those that batch norm uses in eval mode")
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps: got {eps!r}, needs a number >= 0")
    scale = torch.rsqrt(variance + eps)
    scale = scale if gamma is None else scale * gamma
    shift = (mean.neg() if offset is None else offset - mean) * scale
    return scale, shift if beta is None else shift + beta


def count(name: str, value: int | None, channels: int) -> int:
    """How many of the channels may be open; None: all."""
    if value is None:
        return channels
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= channels:
        raise ValueError(f"{name}: got {value!r}, needs a count of channels from 0 to {channels}")
    return value


def check_tensor(name: str, value: object, x: Tensor | None = None) -> None:
    """Refuse what is no dense tensor on the device of x."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got an object of type {type(value).__name__}, needs a tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {value.layout}, needs a dense one")
    if x is not None and value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, needs one on {x.device}, where x is")


def short(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
