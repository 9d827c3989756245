"""masked_bn_act and its kernels on CUDA: launches, streams, graphs. Values are tested beside those on the CPU."""

import pytest
import torch

from fastprune import ops
from fastprune.ops.channel_moments import channel_moments
from fastprune.ops.masked_act import masked_act, masked_act_backward

pytestmark = pytest.mark.gpu

SHAPE = (8, 64, 28, 28)


def draw(dtype=torch.bfloat16, rows=True, seed=0):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
    return x.to(memory_format=torch.channels_last) if rows else x


def vectors(count):
    return [*torch.rand(count, SHAPE[1], generator=torch.Generator().manual_seed(1)).cuda()]


def launches(function):
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("rows", [False, True])
def test_launches(rows):
    x = draw(rows=rows)
    scale, shift, mask = vectors(3)
    forward = launches(lambda: masked_act(x, scale, shift, mask, want_saved=True))
    assert len(forward) == 1
    assert "forward_kernel" in forward[0]
    assert len(launches(lambda: masked_act_backward(x, x, mask, scale))) == 1
    sums = {"want_dmask": True, "want_dshift": True, "want_dscale": True, "x": x}
    assert len(launches(lambda: masked_act_backward(x, x, mask, scale, **sums))) == 2
    assert len(launches(lambda: channel_moments(x))) == 2


@pytest.mark.parametrize("training", [False, True])
def test_no_synchronisation(training, no_synchronisation):
    x = draw().requires_grad_()
    weight, bias, mean, variance, mask = vectors(5)
    mask.requires_grad_()
    with no_synchronisation():
        y = ops.masked_bn_act(x, (weight, bias, mean, variance), mask, training=training)
        y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_graph_capture(training):
    x, other = draw(), draw(seed=2)
    weight, bias, mean, variance, mask = vectors(5)

    def step(x):
        return ops.masked_bn_act(x, (weight, bias, mean.clone(), variance.clone()), mask, training=training)

    step(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x)
    x.copy_(other)
    graph.replay()
    assert torch.equal(y, step(other))


def test_runs_on_the_current_stream():
    x, mask = draw(), vectors(1)[0]
    expected = masked_act(x, mask=mask)[0]
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)  # only work that is ordered behind it sees this
        y = masked_act(late, mask=mask)[0]
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "silu", "hardswish"])
def test_same_bits_as_the_cpu_and_on_every_run(activation, dtype, rows):
    x, dy = draw(dtype, rows), draw(dtype, rows, seed=3)
    scale, shift, mask = vectors(3)
    y, saved = masked_act(x, scale, shift, mask, activation=activation, want_saved=True)
    on_cpu = masked_act(x.cpu(), scale.cpu(), shift.cpu(), mask.cpu(), activation=activation, want_saved=True)
    assert torch.equal(y.cpu(), on_cpu[0])
    assert torch.equal(saved.cpu(), on_cpu[1])
    runs = [masked_act_backward(dy, saved, mask, scale, activation=activation, want_dmask=True) for _ in range(3)]
    assert all(torch.equal(run[1], runs[0][1]) for run in runs)
    dx = masked_act_backward(dy.cpu(), on_cpu[1], mask.cpu(), scale.cpu(), activation=activation)[0]
    assert torch.equal(runs[0][0].cpu(), dx)


@pytest.mark.parametrize("rows", [False, True])
def test_views_of_some_channels(rows):
    x, dy = draw(rows=rows)[:, :24], draw(rows=rows, seed=4)[:, 3:27]
    mask = vectors(1)[0][:24]
    y, saved = masked_act(x, mask=mask, want_saved=True)
    dense, _ = masked_act(x.contiguous(), mask=mask)
    assert torch.equal(y, dense)
    for result, expected in zip(
        masked_act_backward(dy, saved, mask, want_dmask=True),
        masked_act_backward(dy.cpu(), saved.cpu(), mask.cpu(), want_dmask=True),
        strict=True,
    ):
        if result is not None:
            torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-3)


def test_devices_must_agree():
    with pytest.raises(ValueError, match="mask: got a tensor on the CPU, needs one on cuda:0, where x is"):
        masked_act(draw(), mask=torch.ones(SHAPE[1]))
