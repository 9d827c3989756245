"""The CPU kernels give the same bits whatever instruction set they are vectorised for."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from fastprune import _C, ops

WIDEST = _C.instruction_set()


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def limited(request: pytest.FixtureRequest) -> Iterator[None]:
    if not _C.limit_instruction_set(request.param):
        pytest.skip(f"this machine has no {request.param}")
    assert _C.instruction_set() == request.param
    yield
    assert _C.limit_instruction_set(WIDEST)


def gates() -> list[torch.Tensor]:
    values = torch.randn(20_003, generator=torch.Generator().manual_seed(0)) * 6 - 2
    values[::50] = torch.inf
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = values.to(dtype).requires_grad_()
        results.append(ops.bernoulli_gate(leaf, seed=1, step=2))
        for noise in ("gumbel", "logistic", "none"):
            soft = ops.gumbel_gate(leaf, seed=1, step=2, hard=False, noise=noise)
            results += [soft, *torch.autograd.grad(soft.sum(), leaf)]
    return results


def shrunk_units() -> list[torch.Tensor]:
    """Run every path of group_prox: scalars, runs, columns, one unit for all workers."""
    results = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)
        for shape, dim in [((5_003,), 0), ((301, 61), 0), ((130, 75, 3, 3), 1), ((70, 900), 1), ((2, 100_001), 0)]:
            weight = torch.randn(shape, generator=generator, dtype=dtype)
            units = weight.size(dim)
            norms = ops.UnitTable([(weight, dim, torch.arange(units))], units).norms()
            threshold = norms * torch.rand(units, generator=generator, dtype=dtype) * 1.2
            threshold[::7] = 0
            norms_before = ops.group_prox_(ops.UnitTable([(weight, dim, torch.arange(units))], units), threshold)
            results += [norms, norms_before, weight]
    return results


def passes_over_channels() -> list[torch.Tensor]:
    """masked_act both ways and channel_moments: rows of one line and of several, planes, views with gaps."""
    results = []
    shapes = [((3, 70, 9, 5), True, 0), ((5, 7, 6, 6), True, 0), ((5, 7, 6, 6), True, 3), ((2, 5, 30, 30), False, 0)]
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    activations = ("identity", "relu", "relu6", "silu", "hardswish")
    for dtype, (shape, rows, gap), activation in itertools.product(dtypes, shapes, activations):
        generator = torch.Generator().manual_seed(0)
        images = []
        for _ in range(6):
            whole = (3 * torch.randn(shape[0], shape[1] + gap, *shape[2:], generator=generator)).to(dtype)
            whole = whole.contiguous(memory_format=torch.channels_last) if rows else whole
            images.append(whole[:, : shape[1]])
        x, dy, before, y, saved, dx = images
        real = torch.float64 if dtype == torch.float64 else torch.float32
        scale, shift, mask, slope, offset, *sums = torch.randn(8, shape[1], generator=generator).to(real)
        _C.masked_act(x, scale, shift, mask, activation, y, saved, 1)
        _C.masked_act_backward(dy, before, x, mask, scale, shift, slope, offset, activation, dx, *sums, None, 1)
        mean, variance = torch.empty(2, shape[1], dtype=real)
        _C.channel_moments(x, mean, variance, None, 1)
        results += [y, saved, dx, *sums, mean, variance]
    return results


WITH_WIDEST = gates()
SHRUNK_WITH_WIDEST = shrunk_units()
PASSES_WITH_WIDEST = passes_over_channels()


def test_gates(limited):
    for gate, expected in zip(gates(), WITH_WIDEST, strict=True):
        assert torch.equal(gate, expected)


def test_group_prox(limited):
    for result, expected in zip(shrunk_units(), SHRUNK_WITH_WIDEST, strict=True):
        assert torch.equal(result, expected)


def test_passes_over_channels(limited):
    for result, expected in zip(passes_over_channels(), PASSES_WITH_WIDEST, strict=True):
        assert torch.equal(result, expected)


def test_unknown_sets_are_refused():
    with pytest.raises(ValueError, match="highest: got 'sse', needs 'baseline', 'avx2' or 'avx512'"):
        _C.limit_instruction_set("sse")
