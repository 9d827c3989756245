"""FrozenConv computes the same as masked_conv_bn_act, also if its results are deferred."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastprune import ops
from fastprune.ops.conv.frozen import FrozenConv

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = {  # weight, geometry
    "1x1": ((20, 24, 1, 1), {}),
    "3x3": ((20, 24, 3, 3), {"padding": 1}),
    "strided": ((20, 24, 3, 3), {"padding": 1, "stride": 2}),
    "depthwise": ((24, 1, 3, 3), {"padding": 1, "groups": 24}),
    "grouped": ((20, 12, 3, 3), {"padding": 1, "groups": 2}),
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
@pytest.mark.parametrize("kind", ["soft", "hard", "skipping", "cut", "none"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
@pytest.mark.parametrize("reader", SHAPES)
def test_deferred_results_are_the_same(reader, kind, activation, device):
    _, weight, bn, geometry = make(reader, device)
    x, _, (gamma, beta, mean, variance), _ = make("3x3", device)
    channels = weight.shape[1] * geometry.get("groups", 1)
    first_weight = torch.randn(channels, 24, 3, 3).to(device) / 15
    first_bn = tuple(torch.cat([v, v])[:channels] for v in (gamma, beta, mean, variance))
    first = FrozenConv(first_weight, first_bn, padding=1, activation=activation)
    then = FrozenConv(weight, bn, activation="relu", **geometry)
    soft = torch.rand(channels) + 0.5  # "cut": also behind open_out, where it counts as 0
    mask = None if kind == "none" else (soft if kind in ("soft", "cut") else prefix(channels, 12)).to(device)
    opened = {"open_out": 12} if kind in ("skipping", "cut") else {}
    promises = opened | {"hard": kind == "skipping"}
    residual = torch.randn(2, channels, 9, 9).to(device)

    def deferring(x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        return then(first.defer(x, mask, residual=residual, **promises))

    def settling(x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        return then(first.defer(x, mask, residual=residual, **promises).settled())

    def plain(x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        return then(first(x, mask, residual=residual, **opened))

    check_gradients((deferring, settling, plain), x, residual, *([] if mask is None else [mask]))


def check_gradients(functions: Sequence[Callable[..., Tensor]], *inputs: Tensor) -> None:
    """Compare the functions: values with and without gradients, and the gradients."""
    results = []
    for function in functions:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(*leaves)
        with torch.no_grad():
            torch.testing.assert_close(function(*leaves), y, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        results.append((y, *(leaf.grad for leaf in leaves)))
    for ours in results[:-1]:
        for result, expected in zip(ours, results[-1], strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_branches_give_the_same(stride, channels_last, device):
    """Two residual blocks, the first of which has a convolution in its shortcut."""
    torch.manual_seed(0)
    shortcut, *convs = (
        FrozenConv(torch.randn(24, 24, size, size).to(device) / (24 * size**2) ** 0.5,
                   stride=step, padding=size // 2, activation=activation)
        for size, step, activation in ((1, stride, "identity"), (3, 1, "relu"), (3, stride, "relu"), (1, 1, "relu"),
                                       (3, 1, "relu"))
    )  # fmt: skip
    masks = [torch.rand(24).to(device), prefix(24, 9).to(device)]
    x = torch.randn(2, 24, 10, 10).to(device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x

    def fused(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        y, x = convs[0].branch(x, first)
        block = convs[1].defer(y, residual=shortcut(x))
        y, x = convs[2].branch(block, second, open_out=9, hard=True)
        return convs[3].defer(y, residual=x).settled()

    def plain(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        x = convs[1](convs[0](x, first), residual=shortcut(x))
        return convs[3](convs[2](x, second), residual=x)

    check_gradients((fused, plain), x, *masks)


def test_gradients_of_masks_only():
    """Nothing before the first mask requires a gradient, and neither does the branch."""
    x, weight, bn, _ = make("3x3")
    first, then = FrozenConv(weight, bn, padding=1), FrozenConv(torch.randn(8, 20, 1, 1))
    mask = prefix(20, 12).requires_grad_()
    y, branch = first.branch(x, mask, open_out=12, hard=True)
    assert not branch.requires_grad
    (ours,) = torch.autograd.grad(then(y).square().sum(), mask)
    (expected,) = torch.autograd.grad(then(first(x, mask)).square().sum(), mask)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
    assert (ours[12:] != 0).any()


def test_several_readers_each_add_their_gradients():
    x, weight, bn, _ = make("3x3")
    first, a, b = FrozenConv(weight, bn, padding=1), *(FrozenConv(torch.randn(8, 20, 1, 1)) for _ in range(2))
    mask = torch.rand(20)

    def deferring(x: Tensor, mask: Tensor) -> Tensor:
        y = first.defer(x, mask)
        return a(y) + b(y)

    def plain(x: Tensor, mask: Tensor) -> Tensor:
        y = first(x, mask)
        return a(y) + b(y)

    check_gradients((deferring, plain), x, mask)


def test_deferring_without_gradients_computes_open_channels_only():
    x, weight, bn, _ = make("3x3")
    conv = FrozenConv(weight, bn, padding=1)
    with torch.no_grad():
        hidden = conv.defer(x, prefix(20, 7), open_out=7, hard=True)
        assert hidden._r.shape[1] == 7
        torch.testing.assert_close(hidden.settled(), conv(x, prefix(20, 7)))


@pytest.mark.parametrize("hard", [False, True])
def test_a_result_deferred_without_gradients_has_none_later(hard):
    """Its channels behind open_out are gone, which the gradients of their gates would need."""
    x, weight, bn, _ = make("3x3")
    first, then = FrozenConv(weight, bn, padding=1), FrozenConv(torch.randn(8, 20, 1, 1))
    mask = prefix(20, 7).requires_grad_()
    with torch.no_grad():
        hidden, expected = first.defer(x, mask, open_out=7, hard=hard), then(first(x, mask))
    residual = torch.zeros_like(expected).requires_grad_()
    y = then(hidden, residual=residual)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert residual.grad is not None
    assert mask.grad is None
    assert not hidden.settled().requires_grad


def test_deferred_results_are_compared_by_identity():
    x, weight, bn, _ = make("1x1")
    hidden, other = (FrozenConv(weight, bn).defer(x) for _ in range(2))
    assert hidden != other


@pytest.mark.parametrize("with_bn", [False, True])
def test_later_changes_of_its_arguments_are_not_seen(with_bn):
    x, weight, bn, _ = make("1x1")
    bias = torch.randn(20)
    conv = FrozenConv(weight, bn if with_bn else None, bias=bias)
    before = conv(x)
    for tensor in (weight, bias, *bn):
        tensor.zero_()
    assert torch.equal(conv(x), before)


def test_refusals():
    x, weight, bn, _ = make("1x1")
    conv = FrozenConv(weight, bn)
    with pytest.raises(ValueError, match="open_out: got 3 without a mask"):
        conv(x, open_out=3)
    with pytest.raises(ValueError, match="x: got 5 channels, needs 24"):
        conv(x[:, :5])
    for reader in (conv, FrozenConv(torch.randn(24, 1, 3, 3), groups=24)):
        with pytest.raises(ValueError, match="open_in: got 3 beside a deferred x"):
            reader(FrozenConv(torch.randn(24, 24, 1, 1)).defer(x, torch.rand(24)), open_in=3)
    for defers in (conv.defer, conv.branch):
        with pytest.raises(ValueError, match="open_out: got None beside hard=True, needs the number of"):
            defers(x, prefix(20, 7), hard=True)
    with pytest.raises(ValueError, match="x: got an activation whose mask is deferred, needs one without"):
        conv.branch(FrozenConv(torch.randn(24, 24, 1, 1)).defer(x, torch.ones(24)))
    with pytest.raises(ValueError, match=r"x: got 20 channels, needs 24"):
        conv(conv.defer(x))
    assert conv(x[:, :5], open_in=5).shape == (2, 20, 9, 9)
