"""The code that the GPU runs, on host threads: every path of the device bodies against the CPU kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune import _C, ops

# whole_elements, narrow_run, tile_width, work_elements, whole_at_once, wave_elements: small tables then have several
# tiles of several widths, several items a bundle, several waves, and units on either side of every limit.
LIMITS = [
    (8192, 32, 256, 4096, 8, 1),
    (10, 3, 8, 16, 2, 40),
    (1, 1, 1, 1, 1, 1),
    (50, 64, 1024, 40, 3, 2**40),
    (2**40, 1, 4, 7, 1, 1),
]
BLOCKS = [(1, 1), (4, 2), (8, 4), (6, 2)]

seeds = st.integers(0, 2**32)


def run(module, case, limits, threshold=True, **block):
    """A copy of the case after the step, and the norms before."""
    after = case.copy()
    table = module.UnitTable(after.slices, after.num_units, limits)
    norms = torch.full_like(after.threshold, -7)  # every element has to be written
    module.group_prox(table, after.threshold if threshold else None, norms, **block)
    return after, norms


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    seeds, st.integers(1, 30), st.sampled_from([torch.float32, torch.float64]), st.sampled_from(LIMITS),
    st.sampled_from(BLOCKS),
)  # fmt: skip
def test_values_of_random_tables(emulated, make_prox_case, seed, num_units, dtype, limits, threads):
    case = make_prox_case(seed, num_units, dtype)
    if sum(tensor.numel() for tensor in case.tensors) > 20_000 and limits[3] < 100:
        limits = LIMITS[0]  # tiles of single elements take a second for each ten thousand
    num_threads, warp_size = threads
    after, norms = run(emulated, case, limits, num_threads=num_threads, warp_size=warp_size)
    case.check(after, norms)
    untouched, norms_alone = run(emulated, case, limits, False, num_threads=num_threads, warp_size=warp_size)
    assert torch.equal(norms, norms_alone)
    assert all(torch.equal(a, b) for a, b in zip(untouched.tensors, case.tensors, strict=True))


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 30), st.sampled_from([torch.float32, torch.float64]), st.sampled_from(LIMITS))
def test_the_cpu_kernel_agrees_under_every_limit(make_prox_case, seed, num_units, dtype, limits):
    case = make_prox_case(seed, num_units, dtype)
    after, norms = run(_C, case, limits, num_threads=2)
    case.check(after, norms)


@pytest.mark.slow
@pytest.mark.parametrize("threads", BLOCKS)
def test_units_shared_by_many_tiles(emulated, make_prox_case, threads):
    torch.manual_seed(0)
    slices = [
        (torch.randn(60, 30), 1, torch.arange(30)),  # columns, in tiles of several rows
        (torch.randn(30, 500), 0, torch.arange(30)),  # rows, in parts
        (torch.randn(5, 30, 40), 1, torch.arange(30).flip(0)),  # several rows of long runs, units descending
        (torch.randn(90), 0, torch.arange(90) % 30),
    ]
    norms = sum(t.movedim(d, 0).square().reshape(t.size(d), -1).sum(1)[:30] for t, d, _ in slices[:2]).sqrt()
    case = type(make_prox_case(0))(slices, norms * torch.rand(30) * 2)
    num_threads, warp_size = threads
    block = {"num_threads": num_threads, "warp_size": warp_size}
    results = [run(emulated, case, (1, 1, 8, 64, 1, 1), **block) for _ in range(2)]
    case.check(*results[0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][0].tensors, results[1][0].tensors, strict=True))


def test_a_table_can_be_used_again(emulated):
    weight = torch.full((8, 100), 10.0)
    table = emulated.UnitTable([(weight, 1, torch.arange(100))], 100, (1, 1, 16, 32, 1, 1))
    norms = torch.empty(100)
    for step in range(3):
        emulated.group_prox(table, torch.full((100,), 8**0.5), norms, num_threads=4, warp_size=2)
        torch.testing.assert_close(norms, torch.full((100,), (10.0 - step) * 8**0.5))
    torch.testing.assert_close(weight, torch.full((8, 100), 7.0))


@pytest.mark.parametrize("limits", LIMITS[:2])
@pytest.mark.parametrize("bad", [-1.0, torch.nan])
@pytest.mark.parametrize(("shape", "dim"), [((5,), 0), ((5, 7), 0), ((7, 5), 1), ((5, 300), 0)])
def test_a_bad_threshold_leaves_its_unit_alone_and_tells(emulated, limits, bad, shape, dim):
    torch.manual_seed(1)
    weight = torch.randn(shape)
    before, expected = weight.clone(), weight.clone()
    threshold = torch.tensor([0.1, 0.2, bad, 0.0, torch.inf])
    table = emulated.UnitTable([(weight, dim, torch.arange(5))], 5, limits)
    norms = torch.empty(5)
    emulated.group_prox(table, threshold, norms, num_threads=4, warp_size=2)
    good = threshold.nan_to_num(nan=0).clamp(min=0)
    expected_norms = ops.group_prox_(ops.UnitTable([(expected, dim, torch.arange(5))], 5), good)
    torch.testing.assert_close(weight, expected)
    assert torch.equal(weight.select(dim, 2), before.select(dim, 2))
    assert norms.isnan().tolist() == [False, False, True, False, False]
    torch.testing.assert_close(norms[[0, 1, 3, 4]], expected_norms[[0, 1, 3, 4]])


def test_nan_and_infinite_units(emulated):
    weight = torch.ones(5, 6)
    weight[0, 3], weight[1, 2], weight[2, 1] = torch.nan, torch.inf, -torch.inf
    before = weight.clone()
    for limits in LIMITS:
        weight.copy_(before)
        table = emulated.UnitTable([(weight, 0, torch.arange(5))], 5, limits)
        norms = torch.empty(5)
        threshold = torch.tensor([torch.inf, 1.0, torch.inf, 6**0.5 / 2, 0.0])
        emulated.group_prox(table, threshold, norms, num_threads=4, warp_size=2)
        assert torch.equal(weight[:2].view(torch.int32), before[:2].view(torch.int32))
        assert torch.equal(weight[2].view(torch.int32), torch.zeros(6, dtype=torch.int32))
        torch.testing.assert_close(weight[3], torch.full((6,), 0.5))
        torch.testing.assert_close(
            norms, torch.tensor([torch.nan, torch.inf, torch.inf, 6**0.5, 6**0.5]), equal_nan=True
        )


@pytest.mark.parametrize("block", [{"num_threads": 0}, {"num_threads": 6, "warp_size": 4}, {"warp_size": 3}])
def test_impossible_blocks_are_refused(emulated, make_prox_case, block):
    with pytest.raises(ValueError, match="needs a power of two"):
        run(emulated, make_prox_case(0), None, **block)
