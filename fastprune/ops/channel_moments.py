"""Mean and variance of every channel: the batch statistics of a batch norm."""

import torch
from torch import Tensor

from fastprune.ops.arguments import vector_dtype
from fastprune.ops.layout import as_views
from fastprune.ops.library import _C, register


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    (x,) = as_views(x)
    mean, variance = _fake(x)
    partials = None
    if x.is_cuda:
        partials = torch.empty(_C.channel_moments_partials(x), dtype=torch.float64, device=x.device)
    _C.channel_moments(x, mean, variance, partials, torch.get_num_threads())
    return mean, variance


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = vector_dtype(x)
    return x.new_empty(x.size(1), dtype=dtype), x.new_empty(x.size(1), dtype=dtype)


register("_channel_moments(Tensor x) -> (Tensor, Tensor)", _kernel, _fake)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance over everything but the channel, in one pass; without a gradient.

    Args:
        x: ``[N, C, *spatial]``, float16, bfloat16, float32 or float64, with at least one value for each channel.

    Returns:
        Mean and variance, ``[C]``, float32 (float64 for float64), summed in float64.
    """
    mean, variance = torch.ops.fastprune._channel_moments(x)
    return mean, variance
