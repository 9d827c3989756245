"""group_prox_ on CUDA: launches, streams, graphs. Values on CUDA are tested beside those on the CPU."""

import pytest
import torch

from fastprune import ops

pytestmark = pytest.mark.gpu

UNITS = torch.arange(512)


def rows():
    """Return units that a warp computes alone."""
    return torch.randn(512, 64, 3, 3, device="cuda"), 0, UNITS


def columns():
    """Return units that many blocks share."""
    return torch.randn(700, 512, device="cuda"), 1, UNITS


def scalars():
    return torch.randn(512, device="cuda"), 0, UNITS


def kernels_of(function):
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize(("slices", "launches"), [([rows, scalars], 1), ([scalars], 1), ([rows, columns], 2)])
def test_two_launches_at_most(slices, launches):
    table = ops.UnitTable([make() for make in slices], 512)
    threshold = torch.full((512,), 0.1, device="cuda")
    kernels = kernels_of(lambda: ops.group_prox_(table, threshold))
    assert len(kernels) == launches
    assert all("group_prox" in kernel for kernel in kernels)
    assert len(kernels_of(table.norms)) == 1


def test_no_synchronisation(no_synchronisation):
    table = ops.UnitTable([rows(), columns(), scalars()], 512)
    threshold = torch.full((512,), 0.1, device="cuda")
    with no_synchronisation():
        before = ops.group_prox_(table, threshold)
        after = table.norms()
    torch.testing.assert_close(after, (before - 0.1).clamp(min=0), rtol=1e-5, atol=1e-5)


def test_graph_capture():
    slices = [rows(), columns(), scalars()]
    start = [tensor.clone() for tensor, _, _ in slices]
    table = ops.UnitTable(slices, 512)
    threshold = torch.full((512,), 0.5, device="cuda")
    ops.group_prox_(table, threshold)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norms = ops.group_prox_(table, threshold)
    for (tensor, _, _), value in zip(slices, start, strict=True):
        tensor.copy_(value)
    threshold.fill_(1.5)
    expected = table.norms()
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-5)
        expected = (expected - 1.5).clamp(min=0)


def test_runs_on_the_current_stream():
    tensor, dim, units = columns()
    late = torch.zeros_like(tensor)
    expected = ops.UnitTable([(tensor, dim, units)], 512).norms()
    table = ops.UnitTable([(late, dim, units)], 512)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(tensor)  # only work that is ordered behind it sees this
        norms = table.norms()
    stream.synchronize()
    assert torch.equal(norms, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_on_every_run(dtype):
    torch.manual_seed(0)
    start = [(tensor.to(dtype), dim, units) for tensor, dim, units in (rows(), columns(), scalars())]
    results = []
    for _ in range(10):
        slices = [(tensor.clone(), dim, units) for tensor, dim, units in start]
        norms = ops.group_prox_(ops.UnitTable(slices, 512), torch.full((512,), 3.0, dtype=dtype, device="cuda"))
        results.append([norms, *(tensor for tensor, _, _ in slices)])
    for result in results:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


def test_a_unit_that_every_block_shares():
    torch.manual_seed(1)
    weight = torch.randn(20_000_000, device="cuda")
    table = ops.UnitTable([(weight, 0, torch.zeros(20_000_000, dtype=torch.int64))], 1)
    norm = weight.double().norm()
    for _ in range(20):  # the counters of arrivals start again at 0
        torch.testing.assert_close(table.norms()[0].double(), norm, rtol=1e-7, atol=0)
    ops.group_prox_(table, torch.tensor([1000.0], device="cuda"))
    torch.testing.assert_close(weight.double().norm(), norm - 1000, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [rows, columns, scalars])
@pytest.mark.parametrize("bad", [-1.0, torch.nan])
def test_a_bad_threshold_leaves_its_unit_unchanged_and_its_norm_nan(make, bad):
    tensor, dim, units = make()
    before = tensor.clone()
    threshold = torch.full((512,), torch.inf, device="cuda")
    threshold[7] = bad
    norms = ops.group_prox_(ops.UnitTable([(tensor, dim, units)], 512), threshold)
    assert torch.nonzero(norms.isnan()).tolist() == [[7]]
    assert torch.equal(tensor.select(dim, 7), before.select(dim, 7))
    assert torch.count_nonzero(tensor) == torch.count_nonzero(before.select(dim, 7))


def test_units_may_be_on_the_device():
    tensor, dim, units = columns()
    on_device = ops.UnitTable([(tensor, dim, units.cuda())], 512)
    assert torch.equal(on_device.norms(), ops.UnitTable([(tensor, dim, units)], 512).norms())


def test_devices_must_agree():
    tensor, dim, units = columns()
    with pytest.raises(ValueError, match=r"slices\[1\]: got a tensor on the CPU, needs one on cuda:0, where slices"):
        ops.UnitTable([(tensor, dim, units), (torch.ones(512), 0, units)], 512)
    with pytest.raises(ValueError, match="threshold: got a tensor on the CPU, needs one on cuda:0"):
        ops.group_prox_(ops.UnitTable([(tensor, dim, units)], 512), torch.ones(512))


def test_a_module_that_moves_away_is_noticed():
    linear = torch.nn.Linear(8, 512, device="cuda")
    table = ops.UnitTable([(linear.weight, 0, UNITS)], 512)
    linear.cpu()
    with pytest.raises(ValueError, match=r"slices\[0\]: the tensor's memory has moved"):
        ops.group_prox_(table, torch.ones(512, device="cuda"))
