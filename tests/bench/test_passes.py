"""Passes over activations, counted: by hand for a small network, bounded for large ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import fastprune as fp
from fastprune.bench.case import BenchmarkError
from fastprune.bench.passes import Passes, Traffic, count_passes, run_backward
from fastprune.bench.shapes import NETWORKS, network_of
from fastprune.cli.main import main
from fastprune.graph import trace
from fastprune.networks.masked import MaskedNetwork


class Small(nn.Module):
    """Four convolutions; the outputs of all but the first and the last have gates."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1, bias=False) for i in range(4))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet-50", "MobileNetV2"])
def test_a_step_passes_seldom_over_activations(name: str) -> None:
    check(*count_passes(name, network_of(name), NETWORKS[name], batch=256))


EXPECTED = {"ResNet-50": (1.37, 1.44), "MobileNetV2": (1.06, 1.17), "ResNet-56": (1.28, 1.81)}


def check(ours: Passes, torchs: Passes) -> None:
    assert ours.variant == "fastprune"
    assert torchs.variant == "torch"
    assert (ours.forward, ours.backward) == pytest.approx(EXPECTED[ours.name], rel=0.03)
    assert ours.forward < torchs.forward / 2
    assert ours.backward < torchs.backward / 2
    assert ours.launches < torchs.launches
    assert ours.syncs == ours.odd_layouts == 0


def test_a_network_counted_by_hand() -> None:
    """Counted in activations of 8 channels in bfloat16. Vectors and weights are next to nothing."""
    ours, _ = count_passes("small", Small(), 32, batch=64)
    images = 3 / 8 * (2 + 1)  # read in float32, written in bfloat16
    relus, mean = 4 * 2, 1  # each relu reads and writes, the mean reads
    assert ours.forward == pytest.approx((images + relus + mean) / (4 * 2), rel=0.01)
    spread = 1 + 2  # the mean's gradient, which is then brought into channels_last
    relus = 3 + 3 + 2  # a gradient and the activation are read, a gradient is written, but not in front of all gates
    assert ours.backward == pytest.approx((spread + relus) / (4 * 2), rel=0.01)


def test_the_gradients_are_those_of_the_engine() -> None:
    torch.manual_seed(0)
    model = fp.models.create("resnet20").eval().requires_grad_(requires_grad=False)  # residuals and branches
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    gates = torch.rand(graph.num_units, requires_grad=True)
    loss = MaskedNetwork(graph, model)(torch.randn(4, 3, 8, 8), gates).square().sum()
    (expected,) = torch.autograd.grad(loss, gates, retain_graph=True)
    with torch.no_grad():
        ((leaf, gradient),) = run_backward(loss)
    assert leaf is gates
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("read", [torch.nonzero, torch.Tensor.item])
def test_a_step_that_waits_is_refused(read: Callable[[Tensor], object]) -> None:
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
        with Traffic(), pytest.raises(BenchmarkError, match="the step reads a number from the device"):
            read(x)


def test_copies_to_the_host_and_what_is_written_in_place_are_counted() -> None:
    with FakeTensorMode():
        x, y = torch.empty(2, 256, device="cuda")
        with Traffic() as traffic:
            x.add_(y)
            assert traffic.moved == 3 * 1024
            x.copy_(y)
            assert traffic.moved == 5 * 1024
            x[:2].cpu()
        assert traffic.syncs == 1
        assert traffic.launches == 3


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "passes.json"
    assert main(["bench", "passes", "--only", "ResNet-56", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["networks"]
    check(*(Passes(**row) for row in rows))
    assert "ResNet-56" in capsys.readouterr().out


def test_milliseconds_follow_the_rates() -> None:
    """Four convolutions forward, three gradients; at a slow memory all take the time of their bytes."""
    batch, rate = 64, 1e12
    ours, _ = count_passes("small", Small(), 32, batch=batch, rates=(rate, 1e18))
    unit = 2 * 8 * 32 * 32 * batch * 2  # bytes of 8 channels, read and written
    assert ours.forward_ms == pytest.approx(1e3 * ours.forward * 4 * unit / rate)
    assert ours.backward_ms == pytest.approx(1e3 * ours.backward * 4 * unit / rate)
    moved = 3 + (3 / 8 + 1) / 2 + 2  # the gates of the second convolution need the gradients of the two behind it
    assert ours.convolutions_ms == pytest.approx(1e3 * moved * unit / rate, rel=0.01)
    busy, _ = count_passes("small", Small(), 32, batch=batch, rates=(1e18, rate))
    products = 2 * 9 * 8 * 32 * 32 * batch * (3 + 8 * 3 + 8 * 2)
    assert busy.convolutions_ms == pytest.approx(1e3 * products / rate)


def test_half_of_the_rates_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "passes", "--bandwidth", "4.3"]) == 2
    assert "bandwidth and tflops: got one of them" in capsys.readouterr().err
