"""Graphs of a search's step: which calls they serve. What they compute is tested on CUDA."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.networks import replayed
from fastprune.networks.fusion import frozen_convolutions
from fastprune.networks.masked import MaskedNetwork
from fastprune.networks.replayed import ReplayedNetwork


class Graphs:
    """A stand-in for ``make_graphs``, which computes what it was given and counts."""

    def __init__(self) -> None:
        self.captured: list[Sequence[Tensor]] = []
        self.replayed = 0
        self.error: Exception | None = None

    def make(self, network: Callable[..., Any], samples: Sequence[Tensor]) -> Callable[..., Any]:
        assert not torch.is_autocast_cache_enabled()
        if self.error is not None:
            raise self.error
        self.captured.append(samples)

        def replay(*tensors: Tensor) -> Any:
            self.replayed += 1
            return network(*tensors)

        return replay


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Let calls on the CPU be taken for calls on CUDA, and count captures and replays."""
    stand_in = Graphs()
    monkeypatch.setattr(replayed, "make_graphs", stand_in.make)
    monkeypatch.setattr(replayed, "IS_ENABLED", True)
    monkeypatch.setattr(replayed, "are_on_cuda", lambda inputs, gates: all(isinstance(x, Tensor) for x in inputs))
    return stand_in


@pytest.fixture
def network(tiny: nn.Module) -> ReplayedNetwork:
    """A network with frozen weights."""
    tiny.eval().requires_grad_(requires_grad=False)
    return ReplayedNetwork(MaskedNetwork(fp.trace(tiny, torch.zeros(2, 3, 16, 16)), tiny))


def step(network: ReplayedNetwork, count: int = 2) -> Tensor:
    """Take a step on some images; return the gradient of the gates, which must be that of the network itself."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    gates = torch.rand(network.masked.num_units, generator=generator).requires_grad_()
    (gradient,) = torch.autograd.grad(network.under(gates)(images).square().sum(), gates)
    (expected,) = torch.autograd.grad(network.masked(images, gates).square().sum(), gates)
    assert torch.equal(gradient, expected)
    return gradient


def test_the_second_equal_call_is_captured(graphs: Graphs, network: ReplayedNetwork) -> None:
    for _ in range(4):
        step(network)
    assert len(graphs.captured) == 1
    assert [tuple(sample.shape) for sample in graphs.captured[0]] == [(2, 3, 16, 16), (network.masked.num_units,)]
    assert [sample.requires_grad for sample in graphs.captured[0]] == [False, True]
    assert graphs.replayed == 3


def test_a_smaller_batch_runs_the_network(graphs: Graphs, network: ReplayedNetwork) -> None:
    for count in (1, 2, 1, 2, 1, 2, 1, 1):  # equal calls need not follow each other
        step(network, count)
    assert [len(samples[0]) for samples in graphs.captured] == [2]
    assert graphs.replayed == 2


def test_another_precision_runs_the_network(graphs: Graphs, network: ReplayedNetwork) -> None:
    step(network)
    step(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(network)
    assert graphs.replayed == 1


def test_changed_weights_run_the_network(graphs: Graphs, network: ReplayedNetwork) -> None:
    before = [step(network) for _ in range(2)]
    with torch.no_grad():
        for parameter in network.parameters:
            parameter.mul_(1.5)
    assert not torch.equal(step(network), before[1])  # and step compares it with the network itself
    assert graphs.replayed == 1


def test_folded_weights_live_as_long_as_the_graph(graphs: Graphs, network: ReplayedNetwork) -> None:
    """An evaluation in another dtype folds the weights anew; the graph goes on reading the old ones."""
    step(network)
    step(network)
    folded = [weakref.ref(conv) for conv in frozen_convolutions(network.masked.fused)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        network.masked(torch.zeros(2, 3, 16, 16), torch.ones(network.masked.num_units))
    now = frozen_convolutions(network.masked.fused)
    assert folded
    for conv, ref in zip(now, folded, strict=True):
        assert conv.weight.dtype is torch.bfloat16
        assert ref() is not None


def test_new_statistics_run_the_network(graphs: Graphs, network: ReplayedNetwork) -> None:
    for _ in range(2):
        step(network)
    norm = next(norm for norm in network.masked._norms if isinstance(norm, nn.BatchNorm2d))
    norm.train()(torch.randn(4, norm.num_features, 3, 3))
    norm.eval()
    step(network)
    assert graphs.replayed == 1


@pytest.mark.parametrize("what", ["weights", "gates"])
def test_gradients_that_a_graph_lacks(what: str, graphs: Graphs, network: ReplayedNetwork) -> None:
    images, gates = torch.zeros(2, 3, 16, 16), torch.ones(network.masked.num_units)
    if what == "weights":
        network.parameters[0].requires_grad_()
        gates.requires_grad_()
    for _ in range(3):
        network.under(gates)(images)
    assert graphs.captured == []


def test_a_second_call_in_a_step_runs_the_network(graphs: Graphs, network: ReplayedNetwork) -> None:
    """A user's ``forward`` may call the model on two views of a batch; the gradient needs both calls' activations."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        gates = torch.ones(network.masked.num_units, requires_grad=True)
        call = network.under(gates)
        first, second = call(images), call(images.flip(3))
        (gradient,) = torch.autograd.grad((first - second).square().sum(), gates)
        both = network.masked(images, gates), network.masked(images.flip(3), gates)
        assert torch.equal(gradient, torch.autograd.grad((both[0] - both[1]).square().sum(), gates)[0])
    assert len(graphs.captured) == 1
    assert graphs.replayed == 3  # one in each step; in the first step the second call


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("no memory")])
def test_a_failed_capture_is_not_tried_again(error: Exception, graphs: Graphs, network: ReplayedNetwork) -> None:
    graphs.error = error
    step(network)
    with pytest.warns(RuntimeWarning, match=f"without a CUDA graph, and slower where the host is slow: {error}"):
        step(network)
    graphs.error = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(network)
    assert graphs.captured == []


def test_graphs_are_made_if_asked_for(
    graphs: Graphs, network: ReplayedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replayed, "IS_ENABLED", False)
    for _ in range(3):
        step(network)
    assert graphs.captured == []


def test_the_cpu_has_no_graphs(network: ReplayedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "IS_ENABLED", True)
    for _ in range(3):
        step(network)
    assert network._seen == {}
