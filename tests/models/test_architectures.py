"""The papers' CIFAR networks: exact costs, shapes, and the gradient through the type-A shortcut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastprune import models
from fastprune.models.resnet import BasicBlock, PadShortcut


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Count the multiply-accumulates of convolutions and linear layers on one image, from their outputs."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    handles = [module.register_forward_hook(count) for module in model.modules()]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 40.55),
        ("resnet32", 68.86),
        ("resnet56", 125.49),
        ("resnet110", 252.89),
        ("mobilenetv2-cifar", 304.08),
    ],
)
def test_macs_are_the_papers(name: str, millions: float) -> None:
    assert round(count_macs(models.create(name), (3, 32, 32)) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85), ("resnet110", 1.73)]
)
def test_parameters_are_the_papers(name: str, millions: float) -> None:
    assert round(sum(p.numel() for p in models.create(name).parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", models.available())
@pytest.mark.parametrize("size", [8, 28, 32])
def test_any_channels_size_and_classes(name: str, size: int) -> None:
    model = models.create(name, num_classes=7, in_channels=1).eval()
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


def test_pad_shortcut_values() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    y = PadShortcut(new_channels=2, stride=2)(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, 0].any()
    assert not y[:, 3].any()


def test_gradient_flows_through_the_type_a_shortcut() -> None:
    block = BasicBlock(4, 8, stride=2, projection=False)
    nn.init.zeros_(block.bn2.weight)  # the residual branch gives 0: all of the gradient comes through the shortcut
    x = torch.rand(2, 4, 6, 6, requires_grad=True)
    block(x).sum().backward()
    expected = torch.zeros_like(x)
    expected[:, :, ::2, ::2] = 1
    assert torch.equal(x.grad, expected)


def test_type_b_shortcut_is_a_projection() -> None:
    model = models.resnet20(shortcut="B")
    assert isinstance(model.layer2[0].shortcut[0], nn.Conv2d)


@pytest.mark.parametrize(("depth", "shortcut", "message"), [(21, "A", "6n"), (2, "A", "6n"), (20, "C", "'A'")])
def test_wrong_arguments(depth: int, shortcut: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.ResNet(depth, shortcut=shortcut)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "resnet110" else []) for n in models.available()]
)
def test_export_traces(name: str) -> None:
    model = models.create(name).eval()
    x = torch.rand(2, 3, 32, 32)
    exported = torch.export.export(model, (x,), strict=False)
    assert torch.equal(exported.module()(x), model(x))
