"""topk_mask: values, invariants, and its behaviour under torch."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune import ops

KINDS = ("normal", "sigmoid", "ties", "equal", "zeros", "infinite", "bits")
# Both sides of every path: the radix sort (32), the bucket digit (2048), one chunk (16384).
EDGES = [0, 1, 2, 3, 31, 32, 33, 64, 2047, 2048, 2049, 8192]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

layouts = st.lists(st.one_of(st.sampled_from(EDGES[:-1]), st.integers(0, 300)), min_size=1, max_size=8)
seeds = st.integers(0, 2**32)
dtypes = st.sampled_from([torch.float32, torch.float64])


@settings(max_examples=150, deadline=None)
@given(layouts, seeds, st.sampled_from(KINDS), dtypes)
def test_values_of_random_layouts(make_topk_case, sizes, seed, kind, dtype):
    case = make_topk_case(sizes, seed, kind, dtype)
    case.check(ops.topk_mask(*case.args))
    assert torch.equal(ops.topk_mask(*case.hard().args).double(), case.hard().reference())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [*EDGES, 16384, 16385, 100_001])
def test_values_of_every_size(make_topk_case, size, kind, device):
    case = make_topk_case([size, 7, size], seed=size, kind=kind)
    on_device = case.to(device)
    mask = ops.topk_mask(*on_device.args)
    case.check(mask.cpu())
    hard = ops.topk_mask(*on_device.hard().args).cpu()
    assert torch.equal(hard.double(), case.hard().reference())
    assert torch.equal(mask.cpu(), ops.topk_mask(*case.args))  # the same bits everywhere


@pytest.mark.parametrize("keep", [0.0, 1e-30, 1 / 32, 0.5, 31 / 32, 1.0])
@pytest.mark.parametrize("window", [0.0, 1e-30, 0.5, 1.0, 3.0, 16.0, 32.0, torch.inf])
def test_values_at_the_edges(make_topk_case, keep, window):
    case = make_topk_case([32], seed=1)
    case.keep.fill_(keep)
    case.window.fill_(window)
    mask = ops.topk_mask(*case.args)
    case.check(mask)
    if keep in (0.0, 1.0):
        assert (mask == keep).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(make_topk_case, dtype):
    case = make_topk_case([300, 50], seed=2).to(dtype)
    mask = ops.topk_mask(*case.args)
    assert mask.dtype == dtype
    assert torch.equal(mask, case.to(torch.float32).reference().to(dtype))


def test_layout_without_units_or_groups():
    nothing = torch.empty(0)
    assert ops.topk_mask(nothing, nothing, torch.tensor([0])).shape == (0,)
    assert ops.topk_mask(nothing, torch.tensor([0.5, 0.5]), torch.tensor([0, 0, 0])).shape == (0,)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 500), seeds)
def test_permuting_the_scores_permutes_the_mask(make_topk_case, size, seed):
    case = make_topk_case([size], seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    permuted = ops.topk_mask(case.scores[order], *case.args[1:])
    assert torch.equal(permuted, ops.topk_mask(*case.args)[order])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), seeds)
def test_mask_descends_with_the_scores_and_ascends_with_keep(make_topk_case, size, seed):
    case = make_topk_case([size], seed, dtype=torch.float64)
    by_rank = ops.topk_mask(case.scores.sort(descending=True).values, *case.args[1:])
    assert (by_rank.diff() <= 1e-15).all()
    masks = [
        ops.topk_mask(case.scores, torch.tensor([k], dtype=torch.float64), *case.args[2:])
        for k in torch.linspace(0, 1, 40).tolist()
    ]
    assert all((larger - smaller >= -1e-15).all() for smaller, larger in pairwise(masks))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(24, 400), st.floats(0, 1), seeds)
def test_sum_is_the_width_within_the_published_bound(make_topk_case, gamma, size, place, seed):
    case = make_topk_case([size], seed, dtype=torch.float64)
    centre = gamma / 2 + place * (size - gamma)
    case.keep.fill_(centre / size)
    case.window.fill_(gamma)
    assert abs(ops.topk_mask(*case.args).sum().item() - centre) <= 3 / (torch.pi**3 * gamma**2) + 1e-9


def test_soft_mask_depends_on_the_fraction_of_the_width(make_topk_case):
    case = make_topk_case([16], seed=3)
    soft = [ops.topk_mask(case.scores, torch.tensor([u / 16]), case.offsets, torch.tensor([2.0])) for u in (8.5, 9.1)]
    hard = [ops.topk_mask(case.scores, torch.tensor([u / 16]), case.offsets) for u in (8.6, 9.1)]
    assert not torch.equal(*soft)
    assert torch.equal(*hard)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_window", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(make_topk_case, device, with_window, dtype):
    case = make_topk_case([20, 0, 5], seed=5, dtype=dtype).to(device)
    case = case if with_window else case.hard()
    torch.library.opcheck(torch.ops.fastprune._topk_mask.default, case.args)


def test_strided_inputs_give_the_same_result(make_topk_case):
    case = make_topk_case([30, 10], seed=9)
    strided = torch.stack([case.scores, case.scores], dim=1)[:, 0]
    negated = torch.complex(torch.zeros(40), -case.scores).conj().imag
    assert negated.is_neg()
    assert torch.equal(ops.topk_mask(strided, *case.args[1:]), ops.topk_mask(*case.args))
    assert torch.equal(ops.topk_mask(negated, *case.args[1:]), ops.topk_mask(*case.args))


def test_same_bits_on_every_run_and_for_every_number_of_threads(make_topk_case):
    case = make_topk_case([64, 40_000, 3000, 120_000, 512], seed=10, kind="ties")
    before = torch.get_num_threads()
    try:
        masks = []
        for threads in (1, 2, 3, 8, 1, 8):
            torch.set_num_threads(threads)
            masks.append(ops.topk_mask(*case.args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mask, masks[0]) for mask in masks)
