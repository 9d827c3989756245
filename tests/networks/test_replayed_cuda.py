"""Graphs of a search's step on CUDA: they compute what the network computes, and the host starts little."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from fastprune.networks.masked import MaskedNetwork
from fastprune.networks.replayed import ReplayedNetwork
from fastprune.ops.conv.autotune import AUTOTUNER

pytestmark = pytest.mark.gpu

BATCH = 32


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> ReplayedNetwork:
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss_and_gradient(network.under(gates), images, labels, gates)
        torch.cuda.synchronize()
    starts = [event.name for event in profile.events() if event.name in ("cudaGraphLaunch", "cudaLaunchKernel")]
    assert starts.count("cudaGraphLaunch") in (0, 2)  # not every profiler reports launches of graphs
    assert starts.count("cudaLaunchKernel") < 40
