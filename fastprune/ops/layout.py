"""The memory layouts of tensors ``[N, C, *spatial]`` that the kernels read without a copy.

"Planes" are contiguous samples, "rows" are pixels whose channels are neighbours (channels_last). Either may be a view
of some neighbouring channels of a wider tensor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def has_rows(x: Tensor) -> bool:
    """Return whether channels are neighbours: channels_last of any rank, or some channels of a wider such tensor."""
    if x.size(1) != 1 and x.stride(1) != 1:  # a single channel has no neighbour
        return False
    expected = None
    for dim in (*range(x.dim() - 1, 1, -1), 0):
        if x.size(dim) == 1:
            continue
        if expected is None:
            expected = x.stride(dim)
            if expected < x.size(1):
                return False
        elif x.stride(dim) != expected:
            return False
        expected = expected * x.size(dim)
    return True


def has_planes(x: Tensor) -> bool:
    """Return whether every sample is contiguous, or some channels of a wider tensor of which this is true."""
    if x.is_contiguous():  # nearly always; the loop costs microseconds
        return True
    expected = 1
    for dim in range(x.dim() - 1, 0, -1):
        if x.size(dim) != 1 and x.stride(dim) != expected:
            return False
        expected = expected * x.size(dim)
    return bool(x.size(0) == 1 or x.stride(0) >= expected)


def empty_rows(size: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Return uninitialised channels_last memory ``[N, C, *spatial]``, of any rank."""
    channels, space = size[1], math.prod(size[2:])
    strides = [space * channels, 1]
    for extent in size[2:]:
        space = space // max(extent, 1)
        strides.append(space * channels)
    return torch.empty_strided(tuple(size), strides, dtype=dtype, device=device)


def empty_like_views(x: Tensor) -> Tensor:
    """Return uninitialised memory of the shape and memory format of ``x``, without the gaps of a view."""
    if has_planes(x) or not has_rows(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return empty_rows(x.shape, x.dtype, x.device)


def as_views(x: Tensor, *others: Tensor | None) -> list[Tensor]:
    """Return the tensors in the memory format of ``x``, as the kernels need it; copy only those in another one."""
    tensors = [tensor for tensor in (x, *others) if tensor is not None]
    if has_planes(x) or not has_rows(x):
        return [tensor if has_planes(tensor) else tensor.contiguous() for tensor in tensors]
    # copy_, since contiguous() knows channels_last for ranks 4 and 5 only.
    return [
        tensor if has_rows(tensor) else empty_rows(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)
        for tensor in tensors
    ]


def layout_of(x: Tensor) -> torch.memory_format:
    """Return channels_last if the channels of x, or of the wider tensor that it is a view of, are neighbours."""
    return torch.channels_last if x.stride(1) == 1 and not x.is_contiguous() else torch.contiguous_format
