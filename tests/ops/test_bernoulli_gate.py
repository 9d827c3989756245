"""bernoulli_gate: values, probabilities, gradients, and its behaviour under torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune import ops, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Both sides of a quad (4), of a chunk (1024) and of a thread's share (16384).
SIZES = [0, 1, 3, 4, 5, 1023, 1024, 1025, 16_384, 40_001]

seeds = st.integers(0, 2**63 - 1)


def probabilities(size: int, seed: int = 0) -> torch.Tensor:
    """Draw numbers mostly inside of [0, 1], with its ends, their neighbours and numbers outside."""
    random = torch.Generator().manual_seed(seed)
    theta = torch.rand(size, generator=random)
    special = [0.0, -0.0, 1.0, 1.5, -0.5, math.inf, -math.inf, 2.0**-33, 1e-45, 1 - 2.0**-24, 1 + 2.0**-23, 0.5]
    picks = torch.randint(0, len(special), (size,), generator=random)
    return torch.where(torch.rand(size, generator=random) < 0.2, torch.tensor(special)[picks], theta)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.sampled_from(SIZES[:-2]), st.integers(0, 300)), seeds, seeds, st.sampled_from(DTYPES))
def test_values_are_those_of_the_reference(size, seed, step, dtype):
    theta = probabilities(size, seed % 1000).to(dtype)
    gate = ops.bernoulli_gate(theta, seed=seed, step=step)
    assert gate.dtype == dtype
    assert torch.equal(gate, reference.bernoulli_gate(theta, seed=seed, step=step))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_same_bits_everywhere(size, dtype, device):
    theta = probabilities(size).to(dtype)
    gate = ops.bernoulli_gate(theta.to(device), seed=5, step=9)
    assert gate.device.type == device
    assert torch.equal(gate.cpu(), ops.bernoulli_gate(theta, seed=5, step=9))
    assert torch.equal(gate.cpu(), reference.bernoulli_gate(theta, seed=5, step=9))


def test_known_gates():
    """A change of these bits changes the results of every recorded run."""
    gate = ops.bernoulli_gate(torch.full((24,), 0.5), seed=1, step=2)
    assert "".join(str(int(g)) for g in gate) == "001100110101010001011011"


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.1, 0.5, 0.9, 0.9999, 1.0])
def test_frequency(probability):
    size, draws = 50_000, 8
    theta = torch.full((size,), probability)
    opened = sum(int(ops.bernoulli_gate(theta, seed=3, step=step).sum()) for step in range(draws))
    deviation = math.sqrt(size * draws * probability * (1 - probability))
    assert abs(opened - size * draws * probability) <= 5 * deviation + 1e-2  # exact at 0 and 1


def test_the_uniform_number_has_32_bits():
    """A gate opens at every theta above its u, and u is a multiple of 2^-32."""
    size = 1000
    u = reference.philox.random_bits(torch.empty(size), 4, 5).double() * 2.0**-32
    assert (ops.bernoulli_gate(u, seed=4, step=5) == 0).all()
    assert (ops.bernoulli_gate(u + 2.0**-33, seed=4, step=5) == 1).all()
    assert (u.float().double() != u).any()  # so float32 could not represent it


def test_never_at_zero_and_always_at_one():
    size = 2_000_000  # enough for u to come within 2^-20 of either end
    for value in (0.0, -0.0, -1e-45, -3.0, -math.inf):
        assert not ops.bernoulli_gate(torch.full((size,), value), seed=0, step=0).any()
    for value in (1.0, 1 + 2.0**-23, 7.0, math.inf):
        assert ops.bernoulli_gate(torch.full((size,), value), seed=0, step=0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), seeds, seeds)
def test_a_prefix_has_the_prefix_of_the_gates(size, more, seed, step):
    theta = probabilities(size + more)
    longer = ops.bernoulli_gate(theta, seed=seed, step=step)
    assert torch.equal(ops.bernoulli_gate(theta[:size], seed=seed, step=step), longer[:size])


def test_noise_depends_on_seed_and_step_only():
    theta = torch.full((5000,), 0.5)
    first = ops.bernoulli_gate(theta, seed=1, step=2)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(first, ops.bernoulli_gate(theta, seed=1, step=2))
    assert torch.equal(state, torch.get_rng_state())
    for seed, step in [(1, 3), (2, 2), (2, 1), (1 + 2**32, 2), (1, 2 + 2**32), (2**63 - 1, 2), (1, 2**63 - 1)]:
        other = ops.bernoulli_gate(theta, seed=seed, step=step)
        assert 0.46 < (first == other).float().mean() < 0.54


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_may_be_a_tensor(device):
    theta = probabilities(100).to(device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    for number in (0, 1, 2, 2**40, 2**63 - 1):
        step.fill_(number)
        expected = ops.bernoulli_gate(theta, seed=1, step=number)
        assert torch.equal(ops.bernoulli_gate(theta, seed=1, step=step), expected)
        assert torch.equal(reference.bernoulli_gate(theta, seed=1, step=step), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [ops.bernoulli_gate, reference.bernoulli_gate])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_passes_on_the_closed_interval(function, dtype, device):
    values = [-math.inf, -0.1, -0.0, 0.0, 0.3, 0.5, 0.9, 1.0, 1.1, math.inf]
    theta = torch.tensor(values, dtype=dtype, device=device, requires_grad=True)
    weights = torch.arange(1.0, 11.0, dtype=dtype, device=device)
    (function(theta, seed=0, step=0) * weights).sum().backward()
    assert theta.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 8, 0, 0]


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4, 5), (0, 3)])
def test_any_shape(shape):
    theta = probabilities(math.prod(shape)).reshape(shape)
    gate = ops.bernoulli_gate(theta, seed=1, step=1)
    assert gate.shape == shape
    assert torch.equal(gate.flatten(), ops.bernoulli_gate(theta.flatten(), seed=1, step=1))


def test_strided_inputs_give_the_same_result():
    theta = probabilities(120).reshape(10, 12)
    expected = ops.bernoulli_gate(theta, seed=1, step=1)
    for strided in (theta.T.contiguous().T, torch.stack([theta, theta], dim=-1)[..., 0]):
        assert not strided.is_contiguous()
        gate = ops.bernoulli_gate(strided, seed=1, step=1)
        assert gate.is_contiguous()
        assert torch.equal(gate, expected)
    last = theta.reshape(1, 2, 5, 12).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.bernoulli_gate(last, seed=1, step=1).flatten(), expected.flatten())


def test_same_bits_for_every_number_of_threads():
    theta = probabilities(200_001)
    before = torch.get_num_threads()
    try:
        gates = []
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            gates.append(ops.bernoulli_gate(theta, seed=1, step=1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gate, gates[0]) for gate in gates)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_tensor", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(device, with_tensor, dtype):
    theta = probabilities(20).to(device, dtype)
    step = torch.tensor(3, device=device) if with_tensor else None
    torch.library.opcheck(torch.ops.fastprune._bernoulli_gate.default, (theta, 7, 3, step))
    torch.library.opcheck(torch.ops.fastprune._bernoulli_gate.default, (theta.reshape(4, 5).T, 7, 3, step))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "most"), [("int", 2), ("tensor", 1)])
def test_another_step_does_not_recompile(count_programs, kind, most, device):
    compiled, programs = count_programs(lambda theta, step: ops.bernoulli_gate(theta, seed=3, step=step) * 2)
    theta = torch.rand(30, device=device, requires_grad=True)
    for number in range(8):
        step = number if kind == "int" else torch.tensor(number, device=device)
        gate = compiled(theta, step)
        (gradient,) = torch.autograd.grad(gate.sum(), theta)
        assert torch.equal(gate, 2 * ops.bernoulli_gate(theta, seed=3, step=number))
        assert (gradient == 2).all()
    assert len(programs) <= most


@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_the_step_as_an_input(strict):
    class Model(torch.nn.Module):
        def forward(self, theta, step):
            return ops.bernoulli_gate(theta, seed=3, step=step)

    theta = probabilities(30)
    exported = torch.export.export(Model(), (theta, torch.tensor(0)), strict=strict).module()
    for number in (0, 5):
        assert torch.equal(exported(theta, torch.tensor(number)), ops.bernoulli_gate(theta, seed=3, step=number))
