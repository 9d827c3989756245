"""topk_mask on CUDA: launches, streams, graphs. Values on CUDA are tested beside those on the CPU."""

import pytest
import torch

from fastprune import _C, ops

pytestmark = pytest.mark.gpu


def test_one_launch_for_all_groups(make_topk_case):
    case = make_topk_case([64, 2048, 512, 9000, 1], seed=0).to("cuda")
    ops.topk_mask(*case.args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.topk_mask(*case.args)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1
    assert "topk_mask" in kernels[0]


def test_no_synchronisation(make_topk_case, no_synchronisation):
    case = make_topk_case([64, 2048], seed=1)
    args = case.to("cuda").args
    with no_synchronisation():
        mask = ops.topk_mask(*args)
    assert torch.equal(mask.cpu(), ops.topk_mask(*case.args))


def test_graph_capture(make_topk_case):
    case = make_topk_case([64, 2048, 10_000], seed=2).to("cuda")
    other = make_topk_case([64, 2048, 10_000], seed=3).to("cuda")
    ops.topk_mask(*case.args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = ops.topk_mask(*case.args)
    case.scores.copy_(other.scores)
    graph.replay()
    assert torch.equal(mask, ops.topk_mask(other.scores, *case.args[1:]))


def test_runs_on_the_current_stream(make_topk_case):
    case = make_topk_case([2048] * 8, seed=4).to("cuda")
    expected = ops.topk_mask(*case.args)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(case.scores)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(case.scores)  # only work that is ordered behind it sees this
        mask = ops.topk_mask(late, *case.args[1:])
    stream.synchronize()
    assert torch.equal(mask, expected)


def test_offsets_may_be_on_the_cpu(make_topk_case):
    case = make_topk_case([100, 28], seed=5)
    on_device = case.to("cuda")
    mask = ops.topk_mask(on_device.scores, on_device.keep, case.offsets, on_device.window)
    assert torch.equal(mask, ops.topk_mask(*on_device.args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_on_every_run(make_topk_case, dtype):
    case = make_topk_case([64, 8192, 40_000, 512], seed=6, kind="ties", dtype=dtype)
    masks = [ops.topk_mask(*case.to("cuda").args).cpu() for _ in range(5)]
    assert all(torch.equal(mask, ops.topk_mask(*case.args)) for mask in masks)


@pytest.mark.parametrize("size", [20, 9000])
@pytest.mark.parametrize(("name", "value"), [("scores", torch.nan), ("keep", 1.5), ("window", -1.0)])
def test_bad_values_give_nan_in_their_group_only(make_topk_case, size, name, value):
    case = make_topk_case([10, size, 5], seed=7).to("cuda")
    expected = ops.topk_mask(*case.args)
    getattr(case, name)[12 if name == "scores" else 1] = value
    mask = ops.topk_mask(*case.args)
    assert mask[10:-5].isnan().all()
    assert torch.equal(mask[:10], expected[:10])
    assert torch.equal(mask[-5:], expected[-5:])


@pytest.mark.parametrize("offsets", [[1, 4, 9], [0, 4, 8], [0, 2**62, 9], [0, -(2**62), 9]])
def test_malformed_offsets_give_nan_everywhere(make_topk_case, offsets):
    case = make_topk_case([4, 5], seed=8).to("cuda")
    case.offsets.copy_(torch.tensor(offsets))
    assert ops.topk_mask(*case.args).isnan().all()


def test_devices_must_agree(make_topk_case):
    case = make_topk_case([4, 5], seed=9)
    with pytest.raises(ValueError, match="keep: got a tensor on the CPU, needs one on cuda:0, where scores is"):
        ops.topk_mask(case.scores.cuda(), case.keep, case.offsets)


def test_the_module_sees_the_device():
    assert _C.cuda_available()
    assert _C.cuda_device_count() == torch.cuda.device_count()
