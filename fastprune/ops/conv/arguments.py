"""Checks of the arguments of ``masked_conv_bn_act`` and ``FrozenConv``, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprune.ops.arguments import check_floats, check_tensor, check_vector, dtype_name
from fastprune.ops.conv.library import Geometry

FrozenBatchNorm = tuple[Tensor | None, Tensor | None, Tensor, Tensor]
"""Weight, bias, running mean and running variance of a batch norm in eval mode, ``[K]`` each."""


def make_geometry(
    stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int], groups: int
) -> Geometry:
    """Make a geometry of numbers that are checked."""
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: got {groups!r}, needs an integer >= 1")
    return Geometry(
        make_pair("stride", stride, 1), make_pair("padding", padding, 0), make_pair("dilation", dilation, 1), groups
    )


def make_pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Make a pair (vertical, horizontal) of one number or two."""
    numbers = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(numbers) != 2 or not all(isinstance(n, int) and least <= n < 2**31 for n in numbers):
        raise ValueError(f"{name}: got {value!r}, needs an integer >= {least} and below 2^31, or two of them")
    return numbers[0], numbers[1]


def check_images(x: Tensor, weight: Tensor, geometry: Geometry, open_in: int | None = None) -> None:
    """Refuse anything but a convolution of images; x may lack the channels behind the first ``open_in``."""
    check_floats("x", x)
    check_tensor("weight", weight, x)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: got dtype {dtype_name(weight.dtype)}, needs {dtype_name(x.dtype)}, that of x")
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
        raise TypeError(f"residual: got dtype {dtype_name(residual.dtype)}, needs {dtype_name(x.dtype)}, that of x")
    if list(residual.shape) != size:
        raise ValueError(f"residual: got shape {list(residual.shape)}, needs {size}, that of the result")


def check_count(name: str, value: int | None, channels: int) -> int:
    """Return how many of the channels may be open; None: all."""
    if value is None:
        return channels
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= channels:
        raise ValueError(f"{name}: got {value!r}, needs a count of channels from 0 to {channels}")
    return value


def fold_batch_norm(
    bn: FrozenBatchNorm | None, bias: Tensor | None, eps: float, length: int, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Fold the convolution's bias and a batch norm in eval mode into a scale and a shift, ``[K]`` each.

    Args:
        bn: Weight, bias, running mean and running variance, ``[K]`` each, or None for no batch norm.
        bias: Bias of the convolution, ``[K]``, or None.
        eps: Number added to the variance.
        length: ``K``.
        x: The tensor beside which the vectors have to fit.
    """
    offset = None if bias is None else check_vector("bias", bias, x, length)
    if bn is None:
        return None, offset
    if not isinstance(bn, (tuple, list)) or len(bn) != 4:
        raise ValueError("bn: needs (weight, bias, running_mean, running_var), or None")
    gamma, beta, mean, variance = (
        None if value is None else check_vector(f"bn[{place}]", value, x, length) for place, value in enumerate(bn)
    )
    if mean is None or variance is None:
        raise ValueError("bn: got no running statistics, needs those that batch norm uses in eval mode")
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps: got {eps!r}, needs a number >= 0")
    scale = torch.rsqrt(variance + eps)
    scale = scale if gamma is None else scale * gamma
    shift = (mean.neg() if offset is None else offset - mean) * scale
    return scale, shift if beta is None else shift + beta
