"""The code that the GPU runs, on host threads: the device body of the stochastic gates against the CPU kernels."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune import _C

seeds = st.integers(0, 2**63 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])
shapes = st.sampled_from([(1, 1), (4, 3), (3, 5), (16, 1)])  # threads of a block, blocks


def outputs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full_like(values, -7), torch.full_like(values, -7)  # every element has to be written


def values_of(size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed % 2**32)
    values = torch.randn(size, generator=random, dtype=torch.float64) * 2
    special = torch.tensor([0.0, 1.0, -torch.inf, torch.inf, 0.5, -3.0], dtype=torch.float64)
    picks = torch.randint(0, len(special), (size,), generator=random)
    return torch.where(torch.rand(size, generator=random) < 0.2, special[picks], values).to(dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), seeds, seeds, dtypes, shapes, st.booleans())
def test_bernoulli_gate_has_the_bits_of_the_cpu_kernel(emulated, size, seed, step, dtype, shape, in_memory):
    theta = values_of(size, seed, dtype)
    expected, results = outputs(theta), outputs(theta)
    _C.bernoulli_gate(theta, seed, step, *expected)
    where = torch.tensor(step) if in_memory else step
    emulated.bernoulli_gate(theta, seed, where, *results, num_threads=shape[0], num_blocks=shape[1])
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 200),
    seeds,
    seeds,
    dtypes,
    shapes,
    st.booleans(),
    st.sampled_from(["gumbel", "logistic", "none"]),
    st.booleans(),
)
def test_gumbel_gate_has_the_bits_of_the_cpu_kernel(emulated, size, seed, step, dtype, shape, in_memory, noise, hard):
    logits = values_of(size, seed, dtype)
    options = {"temperature": 0.4, "base": 1.0, "hard": hard, "noise": noise}
    expected, results = outputs(logits), outputs(logits)
    _C.gumbel_gate(logits, seed, step, **options, gate=expected[0], slope=expected[1])
    where = torch.tensor(step) if in_memory else step
    launch = {"num_threads": shape[0], "num_blocks": shape[1]}
    emulated.gumbel_gate(logits, seed, where, **options, gate=results[0], slope=results[1], **launch)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


def emulate(
    emulated: ModuleType, name: str, values: torch.Tensor, step: object, noise: str = "gumbel", **shape: int
) -> list[torch.Tensor]:
    results = outputs(values)
    if name == "bernoulli":
        emulated.bernoulli_gate(values, 1, step, *results, **shape)
    else:
        emulated.gumbel_gate(values, 1, step, 0.4, 3.0, True, noise, *results, **shape)
    return list(results)


@pytest.mark.parametrize("name", ["bernoulli", "gumbel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_gives_nan_in_its_unit_alone(emulated, name, dtype):
    values = values_of(50, 0, dtype)
    expected = emulate(emulated, name, values, 2)
    bad = torch.tensor([0, 6, 49])
    for got, right in zip(emulate(emulated, name, values.index_fill(0, bad, torch.nan), 2), expected, strict=True):
        assert got[bad].isnan().all()
        rest = torch.ones(50, dtype=torch.bool).index_fill(0, bad, False)
        assert torch.equal(got[rest], right[rest])


@pytest.mark.parametrize("name", ["bernoulli", "gumbel"])
def test_a_negative_step_in_memory_gives_nan(emulated, name):
    for result in emulate(emulated, name, values_of(50, 0, torch.float32), torch.tensor(-1)):
        assert result.isnan().all()


def test_without_noise_the_step_is_not_looked_at(emulated):
    values = values_of(50, 0, torch.float32)
    without = [emulate(emulated, "gumbel", values, step, noise="none")[0] for step in (0, 5, torch.tensor(-1))]
    assert all(torch.equal(gates, without[0]) for gates in without)


@pytest.mark.parametrize("name", ["bernoulli", "gumbel"])
def test_nothing_else_is_written(emulated, name):
    guarded = torch.full((2, 11 + 2 * 64), -7.0)
    inner = guarded[:, 64:-64]
    values = values_of(11, 0, torch.float32)
    if name == "bernoulli":
        emulated.bernoulli_gate(values, 1, 2, inner[0], inner[1])
    else:
        emulated.gumbel_gate(values, 1, 2, 0.4, 3.0, True, "gumbel", inner[0], inner[1])
    assert (inner != -7).all()
    assert (guarded[:, :64] == -7).all()
    assert (guarded[:, -64:] == -7).all()


@pytest.mark.parametrize("shape", [{"num_threads": 0}, {"num_threads": 1025}, {"num_blocks": 0}, {"num_blocks": -1}])
@pytest.mark.parametrize("name", ["bernoulli", "gumbel"])
def test_impossible_launches_are_refused(emulated, name, shape):
    with pytest.raises(ValueError, match=r"num_(threads|blocks): got -?\d+, needs a number from 1 to 1024"):
        emulate(emulated, name, torch.zeros(4), 0, **shape)
