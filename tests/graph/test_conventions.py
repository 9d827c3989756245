"""The papers' conventions for FLOPs, against the papers' figures and against formulas in these tests."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import fastprune as fp
from fastprune import models

# Prunable FLOPs as the releases of Gao et al. count them, in millions.
AUTH = {
    "resnet18": (224, 1680.80),
    "resnet34": (224, 3534.25),
    "resnet50": (224, 3635.88),
    "mobilenet_v2": (224, 275.39),
    "resnet20": (32, 40.62),
    "resnet56": (32, 126.59),
    "mobilenetv2-cifar": (32, 282.91),
}
LARGE = {"mobilenet_v2", "resnet34", "resnet50", "resnet56", "mobilenetv2-cifar"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in AUTH])
def test_prunable_flops_of_the_releases(name: str) -> None:
    size, expected = AUTH[name]
    if name in models.available():
        model = models.create(name)
    else:
        model = getattr(torchvision.models, name)()
    graph = fp.trace(model, torch.zeros(1, 3, size, size))
    assert float(graph.cost(flops="auth").macs) / 1e6 == pytest.approx(expected, abs=0.005)
    assert graph.cost(flops="auth").params == graph.cost().params
    assert graph.cost(flops="eq8").macs == graph.cost().macs  # the formulas differ under a mask only


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "expected"), [("resnet101", 224, 7363.45), ("resnet110", 32, 255.54)])
def test_prunable_flops_of_the_releases_of_larger_networks(name: str, size: int, expected: float) -> None:
    model = models.create(name) if name in models.available() else getattr(torchvision.models, name)()
    graph = fp.trace(model, torch.zeros(1, 3, size, size))
    assert float(graph.cost(flops="auth").macs) / 1e6 == pytest.approx(expected, abs=0.005)


class Inverted(nn.Module):
    """An inverted residual block with attention, between a stem and a classifier."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), activation())
        self.depthwise = nn.Sequential(
            nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), activation()
        )
        self.attention = torchvision.ops.SqueezeExcitation(24, 6)
        self.project = nn.Sequential(nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(self.attention(self.depthwise(self.expand(self.stem(x)))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("activation", "operations"), [(nn.ReLU, 3), (nn.Hardswish, 6)])
def test_terms_of_an_inverted_block(activation: type[nn.Module], operations: int) -> None:
    graph = fp.trace(Inverted(activation), torch.zeros(1, 3, 8, 8))
    group = next(g for g in graph.groups if g.name == "expand.0")
    for kept in (24, 12, 5):
        mask = torch.ones(graph.num_units)
        mask[group.start + kept : group.start + 24] = 0
        expand = 8 * kept * 64 + operations * kept * 64
        depthwise = 9 * kept * kept / 24 * 16 + operations * kept * 16
        project = kept * 16 * 16 + 3 * 16 * 16
        attention = kept * 6 * 2 + 24 + 16 * kept
        assert float(graph.cost(mask, flops="auth").macs) == pytest.approx(
            expand + depthwise + project + attention, rel=1e-12
        )
        # eq8: every layer, the depthwise one with the square.
        literal = 27 * 8 * 64 + 8 * kept * 64 + 9 * kept * kept / 24 * 16 + kept * 6 * 2 + kept * 16 * 16 + 16 * 5
        assert float(graph.cost(mask, flops="eq8").macs) == pytest.approx(literal, rel=1e-12)
        executed = literal + 9 * (kept - kept * kept / 24) * 16
        assert float(graph.cost(mask).macs) == pytest.approx(executed, rel=1e-12)


def test_parameters_do_not_depend_on_the_convention() -> None:
    graph = fp.trace(Inverted(nn.ReLU), torch.zeros(1, 3, 8, 8))
    mask = (torch.rand(graph.num_units, generator=torch.Generator().manual_seed(0)) < 0.6).double()
    assert graph.cost(mask).params == graph.cost(mask, flops="eq8").params == graph.cost(mask, flops="auth").params


@pytest.mark.parametrize("flops", ["eq8", "auth"])
def test_gradients(flops: fp.graph.conventions.Flops) -> None:
    graph = fp.trace(Inverted(nn.ReLU), torch.zeros(1, 3, 8, 8))
    mask = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: graph.cost(m, flops=flops).macs / 1e4, mask.requires_grad_())


def test_unknown_conventions_are_refused() -> None:
    graph = fp.trace(Inverted(nn.ReLU), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="flops 'thop': the conventions are mac, eq8, auth"):
        graph.cost(flops="thop")  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", ["auth=0.5", "eq8=0.5"])
def test_budgets_in_the_papers_counts(budget: str) -> None:
    model = models.create("resnet20")
    result = fp.prune(model, torch.zeros(1, 3, 32, 32), method="l1", budget=budget, groups="interior")
    flops = budget.partition("=")[0]
    part = [float(result.graph.cost(m, flops=flops).macs) for m in (result.plan.mask, None)]  # type: ignore[arg-type]
    assert 0.49 <= part[0] / part[1] <= 0.5
