"""The code that the GPU runs, on host threads: every path of the device body against the CPU kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune import ops


def emulate(emulated, case, **block):
    mask = torch.full_like(case.scores, -7)  # every element has to be written
    emulated.topk_mask(*case.args, mask, **block)
    return mask


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.sampled_from(["normal", "ties", "equal", "zeros", "infinite", "bits"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([8, 64, 256]),  # below, around and above the sizes: in rounds, or sorted at once
    st.sampled_from([(1, 1), (4, 2), (8, 4), (6, 2)]),
)
def test_same_bits_as_the_cpu_kernel(emulated, make_topk_case, sizes, seed, kind, dtype, capacity, threads):
    case = make_topk_case(sizes, seed, kind, dtype)
    num_threads, warp_size = threads
    mask = emulate(emulated, case, num_threads=num_threads, warp_size=warp_size, capacity=capacity)
    assert torch.equal(mask, ops.topk_mask(*case.args))


@pytest.mark.parametrize("size", [1000, 8192, 9000])
def test_large_groups(emulated, make_topk_case, size):
    case = make_topk_case([size], seed=size)
    assert torch.equal(emulate(emulated, case, num_threads=4, warp_size=2), ops.topk_mask(*case.args))


@pytest.mark.parametrize("capacity", [4, 64])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scores", torch.nan),
        ("keep", 1.5),
        ("keep", -0.5),
        ("keep", torch.nan),
        ("window", -1.0),
        ("window", torch.nan),
    ],
)
def test_bad_values_give_nan_in_their_group_alone(emulated, make_topk_case, capacity, name, value):
    case = make_topk_case([10, 20, 5], seed=1)
    expected = ops.topk_mask(*case.args)
    getattr(case, name)[12 if name == "scores" else 1] = value
    mask = emulate(emulated, case, num_threads=4, warp_size=2, capacity=capacity)
    assert mask[10:30].isnan().all()
    assert torch.equal(mask[:10], expected[:10])
    assert torch.equal(mask[30:], expected[30:])


@pytest.mark.parametrize(
    "offsets", [[1, 4, 9], [0, 4, 8], [0, 10, 9], [0, -(2**62), 9], [0, 2**62, 9], [-1, 4, 9], [9, 4, 0]]
)
def test_malformed_offsets_give_nan_everywhere_and_touch_nothing_else(emulated, make_topk_case, offsets):
    case = make_topk_case([4, 5], seed=2)
    case.offsets.copy_(torch.tensor(offsets))
    guarded = torch.full((9 + 2 * 64,), -7.0)
    mask = guarded[64:-64]
    emulated.topk_mask(*case.args, mask, num_threads=4, warp_size=2)
    assert mask.isnan().all()
    assert (guarded[:64] == -7).all()
    assert (guarded[-64:] == -7).all()


@pytest.mark.parametrize(
    "block", [{"num_threads": 0}, {"num_threads": 6, "warp_size": 4}, {"capacity": 100}, {"warp_size": 3}]
)
def test_impossible_blocks_are_refused(emulated, make_topk_case, block):
    with pytest.raises(ValueError, match="needs a power of two"):
        emulate(emulated, make_topk_case([4], seed=3), **block)
