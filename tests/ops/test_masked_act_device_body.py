"""The code that the GPU runs, on host threads: the bits of the CPU kernel for tensors, its sums but for rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune import _C

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Vectors of 16 bytes and single elements, rows and planes, one task and many, one piece of a plane and two.
SHAPES = [(3, 5), (70, 8), (40, 24), (2, 16, 4, 4), (3, 5, 7, 7), (1, 1, 3, 3), (2, 2, 5000), (0, 4, 2), (2, 8, 0)]
threads = st.sampled_from([(8, 4), (4, 2), (16, 8), (2, 1)])


def draw(shape, dtype, seed, rows=False, gap=0):
    """``gap`` more channels behind those of the view that is returned."""
    random = torch.Generator().manual_seed(seed)
    whole = (3 * torch.randn(shape[0], shape[1] + gap, *shape[2:], generator=random)).to(dtype)
    return (whole.movedim(1, -1).contiguous().movedim(-1, 1) if rows else whole)[:, : shape[1]]


def vectors(channels, dtype, count):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return [*torch.randn(count, channels, generator=torch.Generator().manual_seed(channels)).to(real)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(ACTIVATIONS), st.booleans(), threads,
    st.sampled_from([0, 3, 8]), st.integers(0, 2**32), st.booleans(),
)  # fmt: skip
def test_forward(emulated, shape, dtype, activation, rows, block, gap, seed, adds):
    x, residual = draw(shape, dtype, seed, rows, gap), draw(shape, dtype, seed + 1, rows, gap) if adds else None
    scale, shift, mask = vectors(shape[1], dtype, 3)
    results = []
    for kernel, options in ((_C.masked_act, ()), (emulated.masked_act, block)):
        y, saved = (draw(shape, dtype, 0, rows, gap) for _ in range(2))
        kernel(x, scale, shift, mask, activation, y, saved, *options, residual=residual)
        results.append((y, saved))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(ACTIVATIONS), st.booleans(), threads,
    st.sampled_from([0, 3, 8]), st.integers(0, 2**32), st.integers(1, 15), st.booleans(), st.booleans(),
)  # fmt: skip
def test_backward(emulated, shape, dtype, activation, rows, block, gap, seed, wants, through_statistics, several):
    dy, saved, x = (draw(shape, dtype, seed + i, rows, gap) for i in range(3))
    adds = several and wants < 4 and not through_statistics
    others = draw(shape, dtype, seed + 3, rows, gap) if adds else None
    mask, scale, centre, slope, offset = vectors(shape[1], dtype, 5)
    adjust = (slope, offset) if through_statistics else (None, None)
    results = []
    for kernel, options in ((_C.masked_act_backward, (None,)), (emulated.masked_act_backward, block)):
        outputs = [draw(shape, dtype, 0, rows, gap), *(torch.full_like(mask, -7) for _ in range(3))]
        wanted = [output if wants >> i & 1 else None for i, output in enumerate(outputs)]
        kernel(dy, saved, x, mask, scale, centre, *adjust, activation, *wanted, *options, others=others)
        results.append(outputs)
    (expected_dx, *expected_sums), (dx, *sums) = results
    assert torch.equal(dx, expected_dx)
    size = max(dy.numel() // max(shape[1], 1), 1)
    for ours, expected in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * size**0.5)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_of_the_views_is_written(emulated, dtype, rows):
    shape = (5, 8, 4, 4)
    dy, saved = draw(shape, dtype, 1, rows), draw(shape, dtype, 2, rows)
    whole = torch.full((7, 24, 4, 4), -7.0, dtype=dtype)
    whole = whole.movedim(1, -1).contiguous().movedim(-1, 1) if rows else whole
    dx = whole[1:-1, 8:16]
    dmask = torch.full((10,), -7.0)
    emulated.masked_act_backward(
        dy, saved, None, None, None, None, None, None, "relu", dx, dmask[1:-1], None, None, num_threads=8, warp_size=4
    )
    assert torch.equal(dx, torch.where(saved > 0, dy, 0))
    dx.fill_(-7)
    assert (whole == -7).all()
    assert dmask[0] == dmask[-1] == -7


@pytest.mark.parametrize("block", [(0, 1), (6, 4), (8, 3), (2048, 32)])
def test_impossible_blocks_are_refused(emulated, block):
    x = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"warp_size: got \d+ for num_threads=\d+, needs a power of two that divides num_threads"
    ):
        emulated.masked_act(x, None, None, None, "relu", x, None, *block)
