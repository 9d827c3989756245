"""Packing a weight for the CPU convolution: the same bits for every layout, scale, thread count and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastprune import _C

INSTRUCTIONS = _C.masked_conv_instructions()
KERNELS = [(algorithm, instructions) for instructions in INSTRUCTIONS for algorithm in ("direct", "winograd")]

pytestmark = pytest.mark.skipif(not INSTRUCTIONS, reason="the kernels are not written for this processor")
kernels = pytest.mark.parametrize(("algorithm", "instructions"), KERNELS)


def pack(
    weight: Tensor, algorithm: str, instructions: str, scale: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    rows, channels, *kernel = weight.shape
    size = (channels, rows, *kernel) if transposed else (rows, channels, *kernel)
    packed = torch.full((_C.masked_conv_packed_size(algorithm, instructions, size),), torch.nan)
    _C.masked_conv_pack(algorithm, instructions, weight, scale, transposed, packed, 1)
    assert not packed.isnan().any()  # every element is written, also zeros behind the last row
    return packed


@kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "flipped", "part"])
@pytest.mark.parametrize("transposed", [False, True])
def test_packing_takes_any_strides(algorithm, instructions, layout, transposed):
    weight = torch.randn(37, 21, 3, 3, generator=torch.Generator().manual_seed(1))
    expected = pack(weight, algorithm, instructions, transposed=transposed)
    stored = {
        "contiguous": lambda: weight,
        "channels_last": lambda: weight.to(memory_format=torch.channels_last),
        "flipped": lambda: np.ascontiguousarray(weight.numpy()[::-1, :, ::-1])[::-1, :, ::-1],
        "part": lambda: F.pad(weight, (1, 2, 3, 0, 0, 5, 2, 2), value=torch.nan)[2:-2, :-5, 3:, 1:-2],
    }[layout]()
    size = (21, 37, 3, 3) if transposed else (37, 21, 3, 3)
    for threads in (1, 3):
        packed = torch.empty(_C.masked_conv_packed_size(algorithm, instructions, size))
        _C.masked_conv_pack(algorithm, instructions, stored, None, transposed, packed, threads)
        assert torch.equal(packed, expected)


@kernels
def test_a_scale_gives_the_bits_of_a_scaled_weight(algorithm, instructions):
    weight, scale = torch.randn(37, 21, 3, 3), torch.randn(37)
    scaled = pack(weight * scale.view(-1, 1, 1, 1), algorithm, instructions)
    assert torch.equal(pack(weight, algorithm, instructions, scale), scaled)


def test_winograd_weights_are_rounded_once():
    weight = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    for instructions in INSTRUCTIONS:
        packed = pack(weight, "winograd", instructions).view(16, -1)
        assert torch.equal(packed[:, 0], (g @ weight[0, 0].double() @ g.T).float().flatten())
        assert not packed[:, 1:].any()


@kernels
@pytest.mark.parametrize("limit", ["baseline", "avx2"])
def test_packing_has_the_same_bits_for_all_instructions(algorithm, instructions, limit):
    weight, scale, widest = torch.randn(40, 9, 3, 3), torch.randn(40), _C.instruction_set()
    expected = pack(weight, algorithm, instructions, scale)
    assert _C.limit_instruction_set(limit)
    try:
        assert torch.equal(pack(weight, algorithm, instructions, scale), expected)
    finally:
        assert _C.limit_instruction_set(widest)
