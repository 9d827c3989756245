"""Graphs of a search's step on CUDA: they compute what the network computes, and the host starts little."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from fastprune.networks import replayed
from fastprune.networks.masked import MaskedNetwork
from fastprune.networks.replayed import ReplayedNetwork
from fastprune.ops.conv.autotune import AUTOTUNER

pytestmark = pytest.mark.gpu

BATCH = 32


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> ReplayedNetwork:
    monkeypatch.setattr(replayed, "IS_ENABLED", True)
    monkeypatch.setattr(AUTOTUNER, "enabled", False)  # trying kernels takes minutes
    torch.manual_seed(0)
    model = fp.models.create("resnet20").cuda().eval().requires_grad_(requires_grad=False)
    return ReplayedNetwork(MaskedNetwork(fp.trace(model, torch.zeros(1, 3, 32, 32, device="cuda")), model))


def draw(units: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).to("cuda", memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,), generator=generator).cuda()
    gates = (torch.rand(units, generator=generator) < 0.7).float().cuda().requires_grad_()
    return images, labels, gates


def loss_and_gradient(network, images: Tensor, labels: Tensor, gates: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(network(images).float(), labels)
    return [loss.detach().clone(), *(g.clone() for g in torch.autograd.grad(loss, gates))]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_replays_compute_what_the_network_computes(precision: torch.dtype, network: ReplayedNetwork) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        for seed in range(5):
            images, labels, gates = draw(network.masked.num_units, seed)
            found = loss_and_gradient(network.under(gates), images, labels, gates)
            expected = loss_and_gradient(network.masked.under(gates), images, labels, gates)
            tolerance = 1e-4 if precision is torch.float32 else 0.03
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert network._replay is not None
    assert not network._has_failed


def test_a_replay_waits_for_nothing_and_starts_few_kernels(network: ReplayedNetwork, no_synchronisation) -> None:
    images, labels, gates = draw(network.masked.num_units, 0)
    for _ in range(3):
        loss_and_gradient(network.under(gates), images, labels, gates)
    with no_synchronisation():
        loss_and_gradient(network.under(gates), images, labels, gates)
    assert network._replay is not None
    assert count_launches(network.masked.under(gates), images, labels, gates) > 60
    assert count_launches(network.under(gates), images, labels, gates) < 40


def count_launches(network, *tensors: Tensor) -> int:
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        loss_and_gradient(network, *tensors)
        torch.cuda.synchronize()
    return sum(event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for event in profile.events())


def test_a_search_goes_on_after_a_failed_capture(network: ReplayedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*tensors: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            tensors[0].sum().item()  # a capture forbids to wait
        return network.masked(*tensors)

    monkeypatch.setattr(network, "_call", call)
    stream = torch.cuda.current_stream()
    images, labels, gates = draw(network.masked.num_units, 0)
    expected = loss_and_gradient(network.masked.under(gates), images, labels, gates)
    loss_and_gradient(network.under(gates), images, labels, gates)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        loss_and_gradient(network.under(gates), images, labels, gates)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(8, device="cuda").isfinite().all()
    found = loss_and_gradient(network.under(gates), images, labels, gates)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
