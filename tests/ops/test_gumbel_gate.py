"""gumbel_gate: values, distributions, gradients, and its behaviour under torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune import ops, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NOISES = ["gumbel", "logistic", "none"]
SIZES = [0, 1, 3, 4, 5, 1023, 1024, 1025, 10_001]  # both sides of a quad, of a chunk and of a thread's share
LIMITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 1e-14}

seeds = st.integers(0, 2**63 - 1)
noises = st.sampled_from(NOISES)


def some_logits(size: int, seed: int = 0, spread: float = 4.0) -> torch.Tensor:
    """Draw logits around -3, where with base = 3 a gate is a coin, and some that saturate."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=random) * spread - 3
    special = torch.tensor([0.0, -3.0, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf])
    picks = torch.randint(0, len(special), (size,), generator=random)
    return torch.where(torch.rand(size, generator=random) < 0.1, special[picks], logits)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.sampled_from(SIZES[:-1]), st.integers(0, 300)),
    seeds,
    seeds,
    noises,
    st.sampled_from([0.05, 0.4, 1.0, 30.0]),
    st.sampled_from([3.0, 0.0, -1.5]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_values_of_random_vectors(size, seed, step, noise, temperature, base, dtype):
    logits = some_logits(size, seed % 1000).to(dtype)
    options = {"seed": seed, "step": step, "noise": noise, "temperature": temperature, "base": base}
    soft = ops.gumbel_gate(logits, hard=False, **options).double()
    exact = reference.gumbel_gate(logits.double(), hard=False, **options)
    plain = reference.gumbel_gate(logits, hard=False, **options).double()
    floor = torch.full_like(exact, LIMITS[dtype])  # half a unit in the last place below 1, and some of float64 itself
    assert ((soft - exact).abs() <= torch.maximum(2 * (plain - exact).abs().max() if size else floor, floor)).all()
    hard = ops.gumbel_gate(logits, hard=True, **options)
    assert torch.equal(hard.double(), reference.gumbel_gate(logits.double(), hard=True, **options))


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("noise", NOISES)
def test_values_are_rounded_once(noise, dtype):
    """Compare relative errors: the left tail keeps all of its bits, down to 1e-30."""
    logits = some_logits(20_000, spread=8).to(dtype)
    options = {"seed": 1, "step": 2, "noise": noise, "hard": False}
    soft = ops.gumbel_gate(logits, **options)
    exact = reference.gumbel_gate(logits.double(), **options)
    representable = exact > 2 * torch.finfo(dtype).tiny
    assert soft.dtype == dtype
    error = ((soft.double() - exact).abs() / exact)[representable]
    assert error.max() <= (1.02 * LIMITS[dtype] if dtype.itemsize < 4 else LIMITS[dtype] * 1.001 + 2e-14)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("size", SIZES)
def test_same_bits_everywhere(size, dtype, noise, hard, device):
    logits = some_logits(size).to(dtype)
    options = {"seed": 5, "step": 9, "noise": noise, "hard": hard}
    gates, gradients = [], []
    for place in ("cpu", device):
        leaf = logits.to(place).requires_grad_()
        gate = ops.gumbel_gate(leaf, **options)
        gate.sum().backward()
        assert gate.device.type == place
        gates.append(gate.detach().cpu())
        gradients.append(leaf.grad.cpu())
    assert torch.equal(*gates)
    assert torch.equal(*gradients)


def test_known_gates():
    """A change of these bits changes the results of every recorded run."""
    logits = torch.full((24,), -3.0)
    gate = ops.gumbel_gate(logits, seed=1, step=2)
    assert "".join(str(int(g)) for g in gate) == "110011001011111110100101"
    soft = ops.gumbel_gate(logits[:3].double(), seed=1, step=2, hard=False)
    assert [value.hex() for value in soft.tolist()] == [
        "0x1.fe4f2fba986d6p-1",
        "0x1.9179f385a97edp-1",
        "0x1.33e691018072cp-2",
    ]


@pytest.mark.parametrize("logit", [-9.0, -4.0, -3.0, -2.0, 0.0, 2.0])
@pytest.mark.parametrize("noise", ["gumbel", "logistic"])
def test_frequency(noise, logit):
    size, draws = 50_000, 4
    logits = torch.full((size,), logit)
    opened = sum(int(ops.gumbel_gate(logits, seed=3, step=step, noise=noise).sum()) for step in range(draws))
    probability = 1 - math.exp(-math.exp(logit + 3)) if noise == "gumbel" else 1 / (1 + math.exp(-logit - 3))
    deviation = math.sqrt(size * draws * probability * (1 - probability))
    assert abs(opened - size * draws * probability) <= 5 * deviation


@pytest.mark.parametrize("noise", ["gumbel", "logistic"])
def test_distribution_of_the_noise(noise):
    """Test the largest distance of the distributions (Kolmogorov and Smirnov) at 1 in 1000."""
    size = 100_000
    options = {"seed": 4, "step": 1, "temperature": 10.0, "base": 0.0, "hard": False, "noise": noise}
    drawn = 10 * torch.logit(ops.gumbel_gate(torch.zeros(size, dtype=torch.float64), **options)).sort().values
    expected = torch.exp(-torch.exp(-drawn)) if noise == "gumbel" else torch.sigmoid(drawn)
    ranks = (torch.arange(size) + 0.5) / size
    assert (expected - ranks).abs().max() <= 1.95 / math.sqrt(size)


def test_without_noise_the_sign_decides():
    logits = torch.tensor([-math.inf, -3.0000002, -3.0, -2.9999998, 0.0, math.inf])
    gates = [ops.gumbel_gate(logits, seed=seed, step=seed, noise="none") for seed in (0, 1)]
    assert gates[0].tolist() == [0, 0, 1, 1, 1, 1]
    assert torch.equal(*gates)
    soft = ops.gumbel_gate(logits, seed=0, step=0, noise="none", hard=False)
    torch.testing.assert_close(soft, torch.sigmoid((logits + 3) / 0.4), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), seeds, seeds, noises, st.booleans())
def test_a_prefix_has_the_prefix_of_the_gates(size, more, seed, step, noise, hard):
    logits = some_logits(size + more)
    options = {"seed": seed, "step": step, "noise": noise, "hard": hard}
    longer = ops.gumbel_gate(logits, **options)
    assert torch.equal(ops.gumbel_gate(logits[:size], **options), longer[:size])


@pytest.mark.parametrize("noise", ["gumbel", "logistic"])
def test_noise_depends_on_seed_and_step_only(noise):
    logits = torch.full((5000,), -3.0)
    first = ops.gumbel_gate(logits, seed=1, step=2, noise=noise)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(first, ops.gumbel_gate(logits, seed=1, step=2, noise=noise))
    assert torch.equal(state, torch.get_rng_state())
    for seed, step in [(1, 3), (2, 2), (2, 1), (1 + 2**32, 2), (1, 2 + 2**32)]:
        other = ops.gumbel_gate(logits, seed=seed, step=step, noise=noise)
        assert 0.45 < (first == other).float().mean() < 0.6  # 0.535 for two Gumbel coins of 0.632


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_may_be_a_tensor(device):
    logits = some_logits(100).to(device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    for number in (0, 1, 2**40, 2**63 - 1):
        step.fill_(number)
        expected = ops.gumbel_gate(logits, seed=1, step=number, hard=False)
        assert torch.equal(ops.gumbel_gate(logits, seed=1, step=step, hard=False), expected)
        plain = reference.gumbel_gate(logits, seed=1, step=step, hard=False)
        torch.testing.assert_close(plain, expected)


@settings(max_examples=25, deadline=None)
@given(seeds, noises, st.sampled_from([0.4, 1.0, 3.0]))
def test_gradient_of_soft_gates(seed, noise, temperature):
    logits = (torch.randn(20, generator=torch.Generator().manual_seed(seed % 1000)).double() - 3).requires_grad_()
    options = {"seed": seed, "step": 0, "noise": noise, "temperature": temperature, "hard": False}
    assert torch.autograd.gradcheck(lambda z: ops.gumbel_gate(z, **options), logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [ops.gumbel_gate, reference.gumbel_gate])
@pytest.mark.parametrize("noise", NOISES)
def test_gradient_of_hard_gates_is_that_of_soft_ones(function, noise, device):
    logits = some_logits(500).double().to(device)
    weights = torch.randn(500, generator=torch.Generator().manual_seed(1)).double().to(device)
    gradients = []
    for hard in (True, False):
        leaf = logits.clone().requires_grad_()
        (function(leaf, seed=2, step=3, noise=noise, hard=hard) * weights).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert (gradients[0] != 0).sum() > 300


@pytest.mark.parametrize("hard", [True, False])
def test_gradient_is_exact_where_gates_are_almost_open(hard):
    """With base 3 most are: y(1 - y) of a float32 y has an error of 1 % at 1 - 3e-6, and is 0 from 1 - 3e-8 on."""
    logits = torch.linspace(-3, 12, 1000).requires_grad_()
    ops.gumbel_gate(logits, seed=0, step=0, hard=hard).sum().backward()
    coins = torch.full((1000,), -3.0, dtype=torch.float64)  # the same noise around 1/2
    noise = torch.logit(reference.gumbel_gate(coins, seed=0, step=0, hard=False))
    e = torch.exp(-((logits.detach().double() + 3) / 0.4 + noise).abs())
    expected = e / (1 + e) ** 2 / 0.4
    assert expected.min() < 1e-15
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-6, atol=0)


def test_saturated_gates_have_no_gradient():
    logits = torch.tensor([-math.inf, -3e38, 3e38, math.inf], requires_grad=True)
    ops.gumbel_gate(logits, seed=0, step=0, hard=False).sum().backward()
    assert logits.grad.tolist() == [0, 0, 0, 0]


def test_a_second_derivative_is_refused():
    logits = some_logits(5).requires_grad_()
    gate = ops.gumbel_gate(logits, seed=0, step=0, hard=False)
    (gradient,) = torch.autograd.grad(gate.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4, 5), (0, 3)])
def test_any_shape(shape):
    logits = some_logits(math.prod(shape)).reshape(shape)
    gate = ops.gumbel_gate(logits, seed=1, step=1, hard=False)
    assert gate.shape == shape
    assert torch.equal(gate.flatten(), ops.gumbel_gate(logits.flatten(), seed=1, step=1, hard=False))


def test_strided_inputs_give_the_same_result():
    logits = some_logits(120).reshape(10, 12)
    expected = ops.gumbel_gate(logits, seed=1, step=1, hard=False)
    for strided in (logits.T.contiguous().T, torch.stack([logits, logits], dim=-1)[..., 0]):
        assert not strided.is_contiguous()
        leaf = strided.detach().requires_grad_()
        gate = ops.gumbel_gate(leaf, seed=1, step=1, hard=False)
        gate.sum().backward()
        assert torch.equal(gate, expected)
        assert leaf.grad.shape == logits.shape


def test_same_bits_for_every_number_of_threads():
    logits = some_logits(50_001)
    before = torch.get_num_threads()
    try:
        gates = []
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            gates.append(ops.gumbel_gate(logits, seed=1, step=1, hard=False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gate, gates[0]) for gate in gates)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_tensor", [True, False])
@pytest.mark.parametrize("noise", NOISES)
def test_opcheck(device, with_tensor, noise):
    logits = some_logits(20).to(device)
    step = torch.tensor(3, device=device) if with_tensor else None
    for values in (logits, logits.double().reshape(4, 5).T):
        arguments = (values, 7, 3, step, 0.4, 3.0, not with_tensor, noise)
        torch.library.opcheck(torch.ops.fastprune._gumbel_gate.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "most"), [("int", 2), ("tensor", 1)])
def test_another_step_does_not_recompile(count_programs, kind, most, device):
    compiled, programs = count_programs(lambda logits, step: ops.gumbel_gate(logits, seed=3, step=step) * 2)
    logits = some_logits(30).to(device).requires_grad_()
    for number in range(8):
        step = number if kind == "int" else torch.tensor(number, device=device)
        gate = compiled(logits, step)
        eager = 2 * ops.gumbel_gate(logits, seed=3, step=number)
        gradients = [torch.autograd.grad(result.sum(), logits)[0] for result in (gate, eager)]
        assert torch.equal(gate, eager)
        assert torch.equal(*gradients)
    assert len(programs) <= most


@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_the_step_as_an_input(strict):
    class Model(torch.nn.Module):
        def forward(self, logits, step):
            return ops.gumbel_gate(logits, seed=3, step=step, noise="logistic")

    logits = some_logits(30)
    exported = torch.export.export(Model(), (logits, torch.tensor(0)), strict=strict).module()
    for number in (0, 5):
        expected = ops.gumbel_gate(logits, seed=3, step=number, noise="logistic")
        assert torch.equal(exported(logits, torch.tensor(number)), expected)
