"""The CPU kernels give the same bits whatever instruction set they are vectorised for."""

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
    """Of every path of group_prox: scalars, runs, columns, one unit for all workers."""
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


WITH_WIDEST = gates()
SHRUNK_WITH_WIDEST = shrunk_units()


def test_gates(limited):
    for gate, expected in zip(gates(), WITH_WIDEST, strict=True):
        assert torch.equal(gate, expected)


def test_group_prox(limited):
    for result, expected in zip(shrunk_units(), SHRUNK_WITH_WIDEST, strict=True):
        assert torch.equal(result, expected)


def test_unknown_sets_are_refused():
    with pytest.raises(ValueError, match="highest: got 'sse', needs 'baseline', 'avx2' or 'avx512'"):
        _C.limit_instruction_set("sse")
