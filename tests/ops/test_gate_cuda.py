"""The stochastic gates on CUDA: launches, streams, graphs. Values on CUDA are tested beside those on the CPU."""

import pytest
import torch

from fastprune import ops

pytestmark = pytest.mark.gpu

GATES = {"bernoulli": ops.bernoulli_gate, "gumbel": ops.gumbel_gate}


@pytest.fixture(params=list(GATES))
def gate(request):
    return GATES[request.param]


@pytest.fixture
def values():
    return torch.rand(11_456, generator=torch.Generator().manual_seed(0)).cuda()


def kernels_of(function) -> list[str]:
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_one_launch_forward_and_one_backward(gate, values):
    leaf = values.requires_grad_()
    weights = torch.rand_like(leaf)
    (forward,) = kernels_of(lambda: gate(leaf, seed=0, step=0))
    assert "gate_kernel" in forward
    assert len(kernels_of(lambda: torch.autograd.grad(gate(leaf, seed=0, step=0), leaf, weights))) == 2


def test_no_synchronisation(gate, values, no_synchronisation):
    step = torch.tensor(3, device="cuda")
    leaf = values.requires_grad_()
    with no_synchronisation():
        gates = [gate(leaf, seed=0, step=which) for which in (3, step)]
        for result in gates:
            result.sum().backward()
    assert torch.equal(*gates)


def test_a_captured_graph_draws_anew(gate, values):
    step = torch.tensor(0, device="cuda")
    gate(values, seed=1, step=step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = gate(values, seed=1, step=step)
        step.add_(1)
    for number in range(4):
        graph.replay()
        assert torch.equal(result, gate(values, seed=1, step=number))


def test_runs_on_the_current_stream(gate, values):
    expected = gate(values, seed=1, step=2)
    stream = torch.cuda.Stream()
    late, step = torch.zeros_like(values), torch.tensor(0, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(values)  # only work that is ordered behind it sees this
        step.add_(2)
        result = gate(late, seed=1, step=step)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_large_vectors_have_the_bits_of_the_cpu(gate):
    values = torch.randn(3_000_001, generator=torch.Generator().manual_seed(1))  # more quads than threads in a launch
    assert torch.equal(gate(values.cuda(), seed=1, step=2).cpu(), gate(values, seed=1, step=2))


def test_nan_gives_nan_in_its_unit_only(gate, values):
    expected = gate(values, seed=1, step=2)
    spoilt = values.clone()
    spoilt[7] = torch.nan
    result = gate(spoilt, seed=1, step=2)
    assert result[7].isnan()
    assert not result[:7].isnan().any()
    assert torch.equal(result[8:], expected[8:])


def test_a_negative_step_on_the_device_gives_nan(gate, values):
    assert gate(values, seed=1, step=torch.tensor(-1, device="cuda")).isnan().all()


def test_devices_must_agree(gate, values):
    with pytest.raises(ValueError, match="step: got a tensor on the CPU, needs one on cuda:0"):
        gate(values, seed=1, step=torch.tensor(1))
    with pytest.raises(ValueError, match="step: got a tensor on cuda:0, needs one on the CPU"):
        gate(values.cpu(), seed=1, step=torch.tensor(1, device="cuda"))
