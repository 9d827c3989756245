"""FrozenConv computes what masked_conv_bn_act computes; what is deferred comes out the same in the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastprune import ops
from fastprune.ops.frozen_conv import FrozenConv

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = {  # weight, geometry
    "1x1": ((20, 24, 1, 1), {}),
    "3x3": ((20, 24, 3, 3), {"padding": 1}),
    "strided": ((20, 24, 3, 3), {"padding": 1, "stride": 2}),
    "depthwise": ((24, 1, 3, 3), {"padding": 1, "groups": 24}),
}


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make(name: str, device: str = "cpu") -> tuple[Tensor, Tensor, tuple[Tensor, ...], dict[str, object]]:
    torch.manual_seed(0)
    size, geometry = SHAPES[name]
    weight = torch.randn(size) / (size[1] * size[2] ** 2) ** 0.5
    x = torch.randn(2, 24, 9, 9).to(memory_format=torch.channels_last)
    rows = size[0]
    vectors = (torch.rand(rows) + 0.5, torch.randn(rows), torch.randn(rows), torch.rand(rows) + 0.5)
    return x.to(device), weight.to(device), tuple(vector.to(device) for vector in vectors), geometry


def prefix(length: int, count: int) -> Tensor:
    return (torch.arange(length) < count).float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "silu"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("open_in", "open_out"), [(None, None), (13, 9), (1, 1), (0, 0)])
def test_same_values_and_gradients_as_the_operator(name, activation, channels_last, open_in, open_out, device):
    x, weight, bn, geometry = make(name, device)
    x = x if channels_last else x.contiguous()
    mask = (torch.rand(weight.shape[0]) if open_out is None else prefix(weight.shape[0], open_out)).to(device)
    conv = FrozenConv(weight, bn, activation=activation, **geometry)
    opened = {"open_in": open_in, "open_out": open_out}
    residual = torch.randn_like(ops.masked_conv_bn_act(x, weight, bn, **geometry))
    results = []
    for function in (
        lambda x, mask, residual: conv(x, mask, residual=residual, **opened),
        lambda x, mask, residual: ops.masked_conv_bn_act(
            x, weight, bn, mask, residual=residual, activation=activation, **opened, **geometry
        ),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, mask, residual)]
        y = function(*leaves)
        with torch.no_grad():
            torch.testing.assert_close(function(*leaves), y, rtol=1e-5, atol=1e-5)
        (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum().backward()
        results.append((y, *(leaf.grad for leaf in leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["soft", "hard", "skipping"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_deferred_mask_comes_out_the_same(kind, activation, device):
    x, weight, bn, _ = make("3x3", device)
    second = torch.randn(8, 20, 1, 1).to(device)
    mask = (torch.rand(20) if kind == "soft" else prefix(20, 12)).to(device)
    first, then = FrozenConv(weight, bn, padding=1, activation=activation), FrozenConv(second, activation="identity")
    owed = {"open_in": 12} if kind == "skipping" else {}
    closes = {"open_out": 12} if kind == "skipping" else {}

    def deferring(x: Tensor, mask: Tensor) -> Tensor:
        hidden = first(x, mask, deferred=True, **closes)
        return then(hidden, input_mask=None if kind == "skipping" else mask, **owed)

    def plain(x: Tensor, mask: Tensor) -> Tensor:
        return then(first(x, mask))

    gradients = []
    for function in (deferring, plain):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, mask)]
        y = function(*leaves)
        with torch.no_grad():
            torch.testing.assert_close(function(*leaves), y, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        gradients.append((y, *(leaf.grad for leaf in leaves)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def test_deferring_without_gradients_computes_open_channels_alone():
    x, weight, bn, _ = make("3x3")
    with torch.no_grad():
        hidden = FrozenConv(weight, bn, padding=1)(x, prefix(20, 7), open_out=7, deferred=True)
    assert hidden.shape[1] == 7


def test_later_changes_of_the_weight_are_not_seen():
    x, weight, bn, _ = make("1x1")
    conv = FrozenConv(weight, bn)
    before = conv(x)
    weight.zero_()
    assert torch.equal(conv(x), before)


def test_refusals():
    x, weight, bn, _ = make("1x1")
    conv = FrozenConv(weight, bn)
    with pytest.raises(ValueError, match="open_out: got 3 without a mask"):
        conv(x, open_out=3)
    with pytest.raises(ValueError, match="x: got 5 channels, needs 24"):
        conv(x[:, :5])
    with pytest.raises(ValueError, match=r"input_mask: got shape \[3\], needs \[24\]"):
        conv(x, input_mask=torch.ones(3))
    with pytest.raises(ValueError, match="input_mask: got one for a grouped convolution"):
        FrozenConv(torch.randn(24, 1, 3, 3), groups=24)(x, input_mask=torch.ones(24))
    assert conv(x[:, :5], open_in=5).shape == (2, 20, 9, 9)
