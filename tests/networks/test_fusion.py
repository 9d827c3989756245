"""The fused masked network computes what the plain one computes, forward and backward, in as few calls as expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

import fastprune as fp
from fastprune.graph.interior import interior_units
from fastprune.networks.fusion import FusedConv
from fastprune.networks.masked import MaskedNetwork

LARGE = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
        "mobilenet_v2",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "resnet50",
        "densenet121",
        "regnet_y_400mf",
        "convnext_tiny",
        "efficientnet_b0",
        "vgg11",
    )
]
NETWORKS = ["resnet18", "mobilenet_v3_small", *LARGE]


def random_gates(num_units: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw gates: some closed, some open, some between."""
    gates = torch.rand(num_units, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 1.5 - 0.25
    return gates.clamp(0, 1)


def fused_convs(network: MaskedNetwork) -> list[FusedConv]:
    return [module for module in network.fused.modules() if isinstance(module, FusedConv)]


def gradient(network: Callable[..., Tensor], images: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs, and the gates' gradient of a random linear function of them."""
    gates = gates.clone().requires_grad_()
    outputs = network(images, gates)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    (outputs * weights.to(outputs)).sum().backward()
    assert gates.grad is not None
    return outputs.detach(), gates.grad


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("interior", [True, False])
def test_equals_the_plain_graph(name: str, interior: bool, randomised: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomised(getattr(torchvision.models, name)()).double().eval().requires_grad_(False)
    graph = fp.trace(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    units = interior_units(graph) if interior else torch.ones(graph.num_units, dtype=torch.bool)
    if not bool(units.any()):
        pytest.skip("no channels inside blocks")
    network = MaskedNetwork(graph, model, units)
    assert network.runs_fused()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gates = torch.where(units, random_gates(graph.num_units, torch.float64), 1.0)
    outputs, slopes = gradient(network, images, gates)
    expected, expected_slopes = gradient(network.network, images, gates)
    assert relative_error(outputs, expected) < 1e-12
    assert relative_error(slopes, expected_slopes) < 1e-11


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_in_any_layout(layout: torch.memory_format, randomised: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomised(fp.models.create("resnet20")).eval().requires_grad_(False)
    network = MaskedNetwork(fp.trace(model, torch.zeros(1, 3, 32, 32)), model)
    images = torch.randn(4, 3, 32, 32).to(memory_format=layout)
    gates = random_gates(network.num_units)
    (outputs, slopes), (expected, expected_slopes) = (
        gradient(n, images, gates) for n in (network.fused, network.network)
    )
    assert relative_error(outputs, expected) < 1e-5
    assert relative_error(slopes, expected_slopes) < 1e-4


def test_every_convolution_of_a_resnet_is_fused_and_defers(randomised: Callable[[nn.Module], nn.Module]) -> None:
    """Per bottleneck, readers compute two relus' gradients; the first convolution adds the shortcut's gradient."""
    model = randomised(torchvision.models.resnet50()).eval().requires_grad_(False)
    graph = fp.trace(model, torch.zeros(1, 3, 32, 32))
    network = MaskedNetwork(graph, model, interior_units(graph))
    left = {str(node.target) for node in network.fused.graph.nodes if node.op == "call_function"}
    assert not {name for name in left if any(part in name for part in ("conv", "norm", "relu", "add", "mul"))}
    convs = fused_convs(network)
    assert len(convs) == 53
    assert sum(conv.branches for conv in convs) == 16
    assert sum(conv.defers for conv in convs) == 2 * 16 + 15  # and 15 of the 16 sums: the last one is averaged


def test_changed_weights_are_noticed(tiny: nn.Module) -> None:
    tiny.requires_grad_(False)
    network = MaskedNetwork(fp.trace(tiny, torch.zeros(1, 3, 16, 16)), tiny)
    images, gates = torch.randn(2, 3, 16, 16), torch.ones(network.num_units)
    before = network(images, gates)
    assert torch.allclose(before, tiny(images), atol=1e-5)
    first = next(module for module in tiny.modules() if isinstance(module, nn.Conv2d))
    first.weight.mul_(1.5)
    assert torch.allclose(network(images, gates), tiny(images), atol=1e-5)
    assert not torch.allclose(network(images, gates), before, atol=1e-3)
    norm = next(module for module in tiny.modules() if isinstance(module, nn.BatchNorm2d))
    before = network(images, gates)
    assert norm.running_var is not None
    norm.running_var.fill_(3.0)
    assert torch.allclose(network(images, gates), tiny(images), atol=1e-5)
    assert not torch.allclose(network(images, gates), before, atol=1e-3)
    before = network(images, gates)
    tiny.load_state_dict({name: tensor * 1.3 for name, tensor in tiny.state_dict().items()})
    assert torch.allclose(network(images, gates), tiny(images), atol=1e-5)
    assert not torch.allclose(network(images, gates), before, atol=1e-3)


def test_batches_that_batch_norm_has_seen_are_noticed(tiny: nn.Module) -> None:
    """Torch writes the new statistics without a new version."""
    tiny.requires_grad_(False)
    network = MaskedNetwork(fp.trace(tiny, torch.zeros(1, 3, 16, 16)), tiny)
    images, gates = torch.randn(2, 3, 16, 16), torch.ones(network.num_units)
    before = network(images, gates)
    tiny.train()(5 * images + 1)
    tiny.eval()
    assert torch.allclose(network(images, gates), tiny(images), atol=1e-5)
    assert not torch.allclose(network(images, gates), before, atol=1e-3)


def test_trained_weights_get_their_gradients(tiny: nn.Module) -> None:
    network = MaskedNetwork(fp.trace(tiny, torch.zeros(1, 3, 16, 16)), tiny)
    images = torch.randn(2, 3, 16, 16)
    assert not network.runs_fused()
    network(images, torch.ones(network.num_units)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tiny.parameters())
    with torch.no_grad():
        assert network.runs_fused()


def test_bfloat16_autocast(randomised: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomised(fp.models.create("resnet20")).eval().requires_grad_(False)
    network = MaskedNetwork(fp.trace(model, torch.zeros(1, 3, 32, 32)), model)
    images, gates = torch.randn(4, 3, 32, 32), random_gates(network.num_units)
    exact, exact_slopes = gradient(network.network, images, gates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, slopes = gradient(network.fused, images, gates)
        usual, usual_slopes = gradient(network.network, images, gates)
    assert outputs.dtype == usual.dtype == torch.bfloat16
    assert slopes.dtype == torch.float32
    assert relative_error(outputs.float(), exact) < max(1.2 * relative_error(usual.float(), exact), 1e-3)
    assert relative_error(slopes, exact_slopes) < max(1.2 * relative_error(usual_slopes, exact_slopes), 1e-3)


def test_compiled(tiny: nn.Module) -> None:
    tiny.requires_grad_(False)
    network = MaskedNetwork(fp.trace(tiny, torch.zeros(1, 3, 16, 16)), tiny)
    images, gates = torch.randn(4, 3, 16, 16), random_gates(network.num_units)
    expected, expected_slopes = gradient(network, images, gates)
    compiled: Any = torch.compile(network, backend="aot_eager", fullgraph=True)
    outputs, slopes = gradient(compiled, images, gates)
    assert relative_error(outputs, expected) < 1e-5
    assert relative_error(slopes, expected_slopes) < 1e-4


class Gated(nn.Module):
    """A network and its gates, which are trained under data parallelism."""

    def __init__(self, network: MaskedNetwork) -> None:
        super().__init__()
        self.theta = nn.Parameter(random_gates(network.num_units))
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images, self.theta)


def test_under_distributed_data_parallel(tiny: nn.Module, tmp_path: Any) -> None:
    tiny.requires_grad_(False)
    network = MaskedNetwork(fp.trace(tiny, torch.zeros(1, 3, 16, 16)), tiny)
    images = torch.randn(4, 3, 16, 16)
    _, expected = gradient(network, images, random_gates(network.num_units))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        module = nn.parallel.DistributedDataParallel(Gated(network))
        outputs = module(images)
        weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
        (outputs * weights).sum().backward()
        assert relative_error(module.module.theta.grad, expected) < 1e-6
    finally:
        dist.destroy_process_group()


def test_only_the_chosen_units_have_gates(tiny: nn.Module) -> None:
    tiny.requires_grad_(False)
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    group = graph.groups[0]
    units = torch.zeros(graph.num_units, dtype=torch.bool)
    units[group.units] = True
    network = MaskedNetwork(graph, tiny, units)
    _, slopes = gradient(network, torch.randn(2, 3, 16, 16), torch.ones(graph.num_units))
    assert bool((slopes[group.units] != 0).any())
    assert bool((slopes[~units] == 0).all())


class Odd(nn.Module):
    """Operators that look like chains and are none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(n, 6, 3, padding=1, bias=bias) for n, bias in ((3, True), (6, False), (6, True))
        )
        self.bn = nn.BatchNorm2d(6, affine=False)
        self.d = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = torch.relu(x) + x.mean((2, 3), keepdim=True)  # two readers, and a sum that broadcasts
        z = torch.clamp(self.bn(self.b(y)), -1, 6)  # bounds that are not relu6's
        z = self.c(z) + self.c(z)  # one weight twice, and a sum of two equal values
        w = torch.add(self.b(z), y, alpha=2)  # not a plain sum
        return self.d(torch.nn.functional.hardtanh(w, 0, 6))


class AddsASize(nn.Module):
    """A sum with a number that depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.bn(self.a(x)) + x.shape[0]))


@pytest.mark.parametrize("kind", [Odd, AddsASize])
def test_near_chains_are_computed_correctly(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval().requires_grad_(False)
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    network = MaskedNetwork(graph, model)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(network(images, torch.ones(graph.num_units, dtype=torch.float64)), model(images), atol=1e-12)
    gates = random_gates(graph.num_units, torch.float64)
    outputs, slopes = gradient(network, images, gates)
    expected, expected_slopes = gradient(network.network, images, gates)
    assert relative_error(outputs, expected) < 1e-12
    assert relative_error(slopes, expected_slopes) < 1e-11
