"""The masked network: gates do exactly what removal does, and their gradients reach closed channels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastprune as fp
from fastprune.graph.export.regions import autocast_depth
from fastprune.networks.masked import MaskedNetwork
from fastprune.surgery.rewritten import rewrite_network

LARGE = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("mobilenet_v3_small", "shufflenet_v2_x1_0", "shufflenet_v2_x0_5", "densenet121")
]


@pytest.mark.parametrize("name", ["resnet18", *LARGE])
def test_gates_equal_removal(name: str, randomised: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomised(getattr(torchvision.models, name)()).double().eval()
    graph = fp.trace(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    network = MaskedNetwork(graph, model)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    mask = torch.rand(graph.num_units) < 0.6
    for group in graph.groups:
        mask[group.start] = True
    with torch.no_grad():
        assert torch.allclose(network(images, torch.ones(graph.num_units)), model(images), rtol=0, atol=1e-12)
        compact = fp.apply(graph.plan(mask), model)
        expected = compact(images)
        error = (network(images, mask.double()) - expected).abs().max() / expected.abs().max()
        assert error < 1e-12
        assert torch.equal(fp.masked(model, graph.plan(mask))(images), network(images, mask.double())) or error < 1e-12


def test_channels_that_always_stay_have_no_gate(randomised: Callable[[nn.Module], nn.Module]) -> None:
    """The zero-padded shortcuts of CIFAR ResNets: some channels of a tensor are prunable, others are not."""
    torch.manual_seed(0)
    model = randomised(fp.models.create("resnet20")).double().eval()
    graph = fp.trace(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    assert any(-1 in layer.in_units and layer.in_units.max() >= 0 for layer in graph.layers)
    mask = torch.rand(graph.num_units) < 0.5
    for group in graph.groups:
        mask[group.start] = True
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = fp.apply(graph.plan(mask), model)(images)
        assert torch.allclose(MaskedNetwork(graph, model)(images, mask.double()), expected, rtol=0, atol=1e-10)


def test_gradient_of_gates_by_difference_quotient(tiny: nn.Module) -> None:
    model = tiny.double()
    graph = fp.trace(model, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    network = MaskedNetwork(graph, model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    gates = torch.rand(graph.num_units, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: network(images, g), gates)


def test_closed_gates_get_their_gradient(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    network = MaskedNetwork(graph, tiny)
    gates = torch.ones(graph.num_units)
    gates[graph.groups[1].start] = 0
    gates.requires_grad_()
    network(torch.randn(4, 3, 16, 16), gates).square().sum().backward()
    assert gates.grad is not None
    assert gates.grad[graph.groups[1].start] != 0


def test_the_model_is_shared_and_untouched(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    before = copy.deepcopy(tiny.state_dict())
    network = MaskedNetwork(graph, tiny)
    network.train()
    network(torch.randn(4, 3, 16, 16), torch.ones(graph.num_units))
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    with torch.no_grad():
        tiny.head.bias.fill_(7.0)
        images = torch.randn(1, 3, 16, 16)
        assert torch.allclose(network(images, torch.ones(graph.num_units)), tiny(images))


class InPlace(nn.Module):
    """Overwrites a tensor that a gate reads, after the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        x.add_(y)
        x.relu_()
        return self.c(x)


def test_in_place_operators_do_not_disturb_gates() -> None:
    model = InPlace().double()
    graph = fp.trace(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    network = MaskedNetwork(graph, model)
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.allclose(network(images, torch.ones(graph.num_units)), model(images))
    gates = torch.rand(graph.num_units, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: network(images, g), gates)


def test_autocast_keeps_the_networks_precision(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    network = MaskedNetwork(graph, tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(torch.randn(2, 3, 16, 16), torch.ones(graph.num_units)).dtype == torch.bfloat16


class InFloat32(nn.Module):
    """The code asks for float32 in front of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)).float().mean((2, 3)).to(x.dtype))


def test_autocast_runs_networks_that_convert_types() -> None:
    model = InFloat32().eval()
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gates = torch.ones(graph.num_units, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = MaskedNetwork(graph, model)(images, gates)
        assert torch.equal(results, model(images))
    assert results.dtype == torch.bfloat16
    results.square().sum().backward()
    assert gates.grad is not None
    assert bool((gates.grad != 0).any())


class BatchOfTwo(nn.Module):
    """Takes two samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.reshape(2, 3, 4, 4))


def test_a_batch_that_the_code_does_not_allow_is_refused() -> None:
    model = BatchOfTwo().eval()
    network = MaskedNetwork(fp.trace(model, torch.zeros(2, 3, 4, 4)), model)
    images = torch.randn(2, 3, 4, 4)
    assert torch.allclose(network(images, torch.ones(8)), model(images))
    with pytest.raises(ValueError, match="got a batch of 3; this model could only be traced for batches of 2"):
        network(torch.randn(3, 3, 4, 4), torch.ones(8))


def test_gates_of_another_length_are_refused(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"got shape \(49,\); a vector of 50 units is needed"):
        MaskedNetwork(graph, tiny)(torch.randn(2, 3, 16, 16), torch.ones(49))


class Regions(nn.Module):
    """Layers without gradients and in lower precision, for images of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1)).float()


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_failure_within_a_region_leaves_the_modes_as_they_were(rewritten: bool) -> None:
    model, example = Regions().eval(), torch.zeros(2, 3, 4, 4)
    graph = fp.trace(model, example)
    plan = graph.plan(torch.ones(graph.num_units))
    network = rewrite_network(plan, model, copy.deepcopy(model)) if rewritten else MaskedNetwork(graph, model)
    gates = () if rewritten else (torch.ones(graph.num_units),)
    assert torch.isfinite(network(example, *gates)).all()
    (network.head if rewritten else network.network.head)._parameters["weight"] = torch.zeros(3, 5)
    before = torch.get_autocast_dtype("cpu"), autocast_depth()
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.raises(RuntimeError, match="shapes"):
            network(example, *gates)
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="shapes"):
        network(example, *gates)
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.get_autocast_dtype("cpu"), autocast_depth()) == before
    assert torch.is_grad_enabled()
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
