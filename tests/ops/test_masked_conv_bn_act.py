"""masked_conv_bn_act: values and gradients against float64, skipping, and its behaviour under torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune import ops, reference

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINKED = ("relu", "relu6", "hardswish")
"""One rounding can move a value across the kink, and half precision rounds often."""
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
GRADIENTS = ("x", "weight", "gamma", "beta", "mask", "bias", "residual")


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn tf32 off: its roundings move float32 values across a kink often enough to matter."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@dataclass(frozen=True)
class Case:
    """The arguments of a call; each tensor has a name, those of the batch norm too."""

    tensors: dict[str, Tensor | None] = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, target: Any) -> Case:
        moved = {name: None if t is None else t.to(target) for name, t in self.tensors.items()}
        return replace(self, tensors=moved)

    def call(self, function: Any, wanted: tuple[str, ...] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the result, and the gradients of a fixed random function of it with respect to ``wanted``."""
        tensors = {n: None if t is None else t.detach().clone() for n, t in self.tensors.items()}
        leaves = {n: t.requires_grad_() for n, t in tensors.items() if n in wanted and t is not None}
        bn = None if tensors["mean"] is None else tuple(tensors[n] for n in ("gamma", "beta", "mean", "variance"))
        rest = {n: tensors[n] for n in ("bias", "residual")}
        y = function(tensors["x"], tensors["weight"], bn, tensors["mask"], **rest, **self.options)
        if not leaves or not y.requires_grad:
            return y.detach(), {}
        direction = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(y, list(leaves.values()), direction.to(y), allow_unused=True)
        return y.detach(), {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}

    def check(self, wanted: tuple[str, ...] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Allow twice the error of plain torch in the dtype of the case, against float64.

        Torch's result may be exact by chance: also allow two roundings of the terms of y, and 8 roundings of the
        largest gradient; sums over n pixels may add up sqrt(n) roundings.
        """
        y, gradients = self.call(ops.masked_conv_bn_act, wanted)
        plain, plain_gradients = self.call(reference.masked_conv_bn_act, wanted)
        exact, exact_gradients = self.to(torch.float64).call(reference.masked_conv_bn_act, wanted)
        assert gradients.keys() == plain_gradients.keys()
        assert y.dtype == plain.dtype
        exact_rounds = y.dtype == torch.float64  # in float64 the exact results are rounded, too
        rounding = torch.finfo(y.dtype).eps * (4 if exact_rounds else 1)
        close("y", y, plain, exact, 2 * rounding * self.magnitude())
        for name, gradient in gradients.items():
            largest = exact_gradients[name].abs().amax().item() if gradient.numel() else 0.0
            summed = y.numel() / y.shape[1] if gradient.dim() == 1 else 0
            floor = 8 * rounding * max(largest, summed**0.5)
            close(name, gradient, plain_gradients[name], exact_gradients[name], floor)
        return y, gradients

    def magnitude(self) -> float:
        """Return the largest sum of the absolute values of an output's terms."""
        absolute = {n: None if t is None else t.double().abs() for n, t in self.tensors.items()}
        if absolute["mean"] is not None:
            absolute["mean"] = -absolute["mean"]  # it is subtracted
        y, _ = Case(absolute, {**self.options, "activation": "identity"}).call(reference.masked_conv_bn_act)
        return y.amax().item() if y.numel() else 0.0


def close(name: str, ours: Tensor, plain: Tensor, exact: Tensor, floor: float) -> None:
    assert ours.shape == plain.shape == exact.shape
    if exact.numel() > 0:
        error, plain_error = ((t.double().cpu() - exact.cpu()).abs().amax().item() for t in (ours, plain))
        # In this order a NaN of torch (a convolution without samples) allows the floor only.
        assert error <= max(floor, 2 * plain_error), (name, error, plain_error, floor)


def make_case(
    *,
    seed: int = 0,
    batch: int = 2,
    channels: int = 6,
    rows: int = 5,
    groups: int = 1,
    size: tuple[int, int] = (7, 6),
    kernel: int = 3,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    mask: str = "hard",
    bn: bool = True,
    extras: bool = False,
    whole: bool = False,
    **options: Any,
) -> Case:
    """Make a case with ``channels`` and ``rows`` in each group; ``whole``: of whole numbers, which are not rounded."""
    torch.manual_seed(seed)
    inputs, outputs = channels * groups, rows * groups
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, inputs, *size)
    weight = torch.randn(outputs, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    if whole:  # small enough for bfloat16 to add up without rounding
        x, weight = x.round().clamp(-2, 2), weight.sign()
    x, weight = x.to(dtype).to(memory_format=layout), weight.to(dtype)
    tensors: dict[str, Tensor | None] = dict.fromkeys((*GRADIENTS, "mean", "variance"))
    tensors |= {"x": x, "weight": weight.to(memory_format=layout)}
    if bn:
        tensors |= {"gamma": torch.rand(outputs) + 0.5, "beta": torch.randn(outputs)}
        tensors |= {"mean": torch.randn(outputs), "variance": torch.rand(outputs) + 0.5}
        if whole:
            tensors |= {"gamma": torch.ones(outputs), "variance": torch.ones(outputs)}
            tensors |= {n: tensors[n].round() for n in ("beta", "mean")}
    masks = {"hard": (torch.rand(outputs) < 0.5).float(), "soft": torch.rand(outputs), "none": None}
    masks |= {"open": torch.ones(outputs), "closed": torch.zeros(outputs)}
    tensors["mask"] = masks[mask]
    options = {"groups": groups, **({"eps": 1e-30} if whole else {}), **options}
    if extras:
        y = reference.masked_conv_bn_act(x.float(), weight.float(), None, **options)
        bias, residual = torch.randn(outputs), torch.randn(y.shape)
        bias, residual = (bias.round(), residual.round()) if whole else (bias, residual)
        tensors |= {"bias": bias, "residual": residual.to(dtype).to(memory_format=layout)}
    names = {"gamma", "beta", "mean", "variance", "mask", "bias"}
    tensors = {n: t.to(vector) if t is not None and n in names else t for n, t in tensors.items()}
    return Case(tensors, options)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel, dilation = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 2))
    padding = draw(st.integers(0, 2))
    least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
    groups, depthwise = draw(st.sampled_from([1, 1, 2, 4])), draw(st.booleans())
    channels = 1 if depthwise and groups > 1 else draw(st.sampled_from([1, 2, 3, 8, 17]))
    rows = draw(st.sampled_from([1, 2, 8, 11]))
    dtype, activation = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(ACTIVATIONS))
    return make_case(
        seed=draw(st.integers(0, 2**16)),
        batch=draw(st.sampled_from([0, 1, 2, 3])),
        channels=channels,
        rows=rows,
        groups=groups,
        size=(draw(st.integers(least, 9)), draw(st.integers(least, 9))),
        kernel=kernel,
        dtype=dtype,
        whole=dtype in HALF and activation in KINKED,
        channels_last=draw(st.booleans()),
        mask=draw(st.sampled_from(["hard", "soft", "none", "open", "closed"])),
        bn=draw(st.booleans()),
        extras=draw(st.booleans()),
        stride=draw(st.integers(1, 2)),
        padding=padding,
        dilation=dilation,
        activation=activation,
        open_in=draw(st.none() | st.integers(0, channels * groups)),
        open_out=draw(st.none() | st.integers(0, rows * groups)),
    )


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([(), ("x", "mask"), ("mask",), ("x",), GRADIENTS]))
def test_values_and_gradients_of_random_convolutions(case, wanted):
    case.check(wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 64, "rows": 48, "kernel": 1},
        {"channels": 24, "rows": 40, "padding": 1},
        {"channels": 16, "rows": 32, "padding": 1, "stride": 2},
        {"channels": 1, "rows": 1, "groups": 32, "padding": 1},
        {"channels": 300, "rows": 200, "kernel": 1, "size": (1, 1)},
        {"channels": 3, "rows": 16, "kernel": 7, "stride": 2, "padding": 3, "size": (16, 16)},
    ],
    ids=["1x1", "3x3", "strided", "depthwise", "one pixel", "stem"],
)
def test_layers_of_networks(shape, activation, dtype, device):
    whole = dtype in HALF and activation in KINKED
    case = make_case(dtype=dtype, activation=activation, mask="soft", whole=whole, **shape).to(device)
    for wanted in ((), ("x", "mask"), GRADIENTS):
        case.check(wanted)


@pytest.mark.parametrize("mask", ["hard", "open", "closed"])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("gradients", [True, False])
def test_skipping_changes_nothing(mask, groups, gradients):
    """If the open channels come first, the result is that of the whole convolution."""
    shape = {"channels": 2, "rows": 2} if groups > 1 else {"channels": 12, "rows": 10}
    whole = make_case(mask=mask, groups=groups, padding=1, dtype=torch.float64, **shape)
    x, masks = whole.tensors["x"], whole.tensors["mask"]
    masks.copy_(masks.sort(descending=True).values)
    open_out = int(masks.sum())
    wanted = ("x", "weight", "gamma", "beta", "mask") if gradients else ()
    for open_in in (x.shape[1], 7, 1, 0):
        x[:, open_in:] = 0
        y, expected = whole.call(ops.masked_conv_bn_act, wanted)
        skipping = replace(whole, options={**whole.options, "open_in": open_in, "open_out": open_out})
        z, skipped = skipping.call(ops.masked_conv_bn_act, wanted)
        torch.testing.assert_close(z, y, rtol=0, atol=1e-12)
        for name in wanted:
            gradient = expected[name]
            if name == "weight" and groups == 1:  # closed inputs are 0, and so is their gradient
                assert (gradient[:, open_in:] == 0).all()
            torch.testing.assert_close(skipped[name], gradient, rtol=0, atol=1e-12)


def test_closed_inputs_are_not_read():
    case = make_case(channels=6, rows=5, open_in=4, open_out=3)
    clean, clean_gradients = case.call(ops.masked_conv_bn_act, ("x", "mask"))
    case.tensors["x"][:, 4:] = torch.nan
    y, gradients = case.call(ops.masked_conv_bn_act, ("x", "mask"))
    assert torch.equal(y, clean)
    assert (y[:, 3:] == 0).all()
    assert all(torch.equal(gradients[name], clean_gradients[name]) for name in ("x", "mask"))


def test_closed_channels_get_their_straight_through_gradient():
    case = make_case(mask="closed", dtype=torch.float64)
    y, gradients = case.check(("mask", "x"))
    assert (y == 0).all()
    assert (gradients["mask"] != 0).all()
    assert (gradients["x"] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation):
    case = make_case(channels=2, rows=3, size=(4, 4), dtype=torch.float64, mask="soft", extras=True, padding=1)
    names = [name for name in GRADIENTS if case.tensors[name] is not None]
    statistics = case.tensors["mean"], case.tensors["variance"]

    def function(*values: Tensor) -> Tensor:
        t = dict(zip(names, values, strict=True))
        bn = (t["gamma"], t["beta"], *statistics)
        rest = {"bias": t["bias"], "residual": t["residual"], "padding": 1, "activation": activation}
        return ops.masked_conv_bn_act(t["x"], t["weight"], bn, t["mask"], **rest)

    leaves = [case.tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, atol=1e-4)


def test_views_give_the_same_result():
    case = make_case(channels=6, rows=5, size=(5, 5))
    expected, _ = case.call(ops.masked_conv_bn_act)
    x = case.tensors["x"]
    wide = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, :6]
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (wide, turned, x.contiguous()):
        assert not view.is_contiguous(memory_format=torch.channels_last)
        y, _ = Case({**case.tensors, "x": view}, case.options).call(ops.masked_conv_bn_act)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [(7, 6), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"open_out": 3}, {"open_in": 2}, {"activation": "silu"}])
def test_layout_is_kept(channels_last, size, options):
    case = make_case(size=size, channels_last=channels_last, padding=1, **options)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for wanted in ((), ("mask", "x")):
        y, gradients = case.call(ops.masked_conv_bn_act, wanted)
        assert y.is_contiguous(memory_format=layout)
        assert all(gradients[name].is_contiguous(memory_format=layout) for name in wanted if name == "x")


def test_frozen_network_saves_neither_input_nor_weight_gradient():
    case = make_case()
    x, weight, mask = (case.tensors[name].clone() for name in ("x", "weight", "mask"))
    statistics = tuple(case.tensors[name] for name in ("gamma", "beta", "mean", "variance"))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.masked_conv_bn_act(x.requires_grad_(), weight, statistics, mask.requires_grad_())
    assert not any(t.shape == x.shape for t in saved)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("opened", [{}, {"open_in": 3, "open_out": 2}])
def test_opcheck(activation, extras, opened, device):
    case = make_case(activation=activation, extras=extras, padding=1, **opened).to(device)
    t = case.tensors
    opened = {"open_in": 6, "open_out": 5} | opened
    options = ([1, 1], [1, 1], [1, 1], 1, activation, *opened.values())
    for trains in (False, True):
        arguments = (t["x"], t["weight"], t["gamma"], t["beta"], t["mask"], t["residual"], *options, trains)
        torch.library.opcheck(torch.ops.fastprune._masked_conv.default, arguments)
    dy, saved = torch.randn_like(arguments[0].new_empty(2, 5, 7, 6)), torch.randn(2, 5, 7, 6, device=device)
    for wanted in ([True, False, False, False, True, False], [True] * 6):
        arguments = (dy, t["x"], t["weight"], t["gamma"], t["mask"], saved, list(t["x"].shape), *options, wanted)
        torch.library.opcheck(torch.ops.fastprune._masked_conv_backward.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("opened", [{}, {"open_in": 3, "open_out": 2}])
def test_compiles_without_a_graph_break(opened, device):
    case = make_case(padding=1, extras=True, **opened).to(device)
    compiled = torch.compile(ops.masked_conv_bn_act, fullgraph=True, backend="aot_eager")
    wanted = ("x", "mask", "weight")
    y, gradients = case.call(compiled, wanted)
    expected, expected_gradients = case.call(ops.masked_conv_bn_act, wanted)
    assert torch.equal(y, expected)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in wanted)


def test_a_changing_count_of_open_channels_does_not_recompile_forever():
    case = make_case(padding=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(ops.masked_conv_bn_act, fullgraph=True, backend=counter)
    for count in (5, 4, 3, 2):
        opened = replace(case, options={**case.options, "open_out": count})
        y, _ = opened.call(compiled, ("mask",))
        assert torch.equal(y, opened.call(ops.masked_conv_bn_act, ("mask",))[0])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict):
    class Model(torch.nn.Module):
        def forward(self, x, weight, mean, variance, mask):
            return ops.masked_conv_bn_act(x, weight, (None, None, mean, variance), mask, padding=1)

    t = make_case().tensors
    arguments = tuple(t[name] for name in ("x", "weight", "mean", "variance", "mask"))
    exported = torch.export.export(Model(), arguments, strict=strict)
    assert torch.equal(exported.module()(*arguments), Model()(*arguments))


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_takes_float32_vectors(device):
    case = make_case(dtype=torch.bfloat16).to(device)
    y, gradients = case.call(ops.masked_conv_bn_act, ("x", "mask"))
    assert y.dtype == gradients["x"].dtype == torch.bfloat16
    assert gradients["mask"].dtype == torch.float32


def test_same_bits_on_every_run():
    case = make_case(channels=64, rows=64, size=(14, 14), padding=1)
    runs = [case.call(ops.masked_conv_bn_act, ("x", "mask")) for _ in range(3)]
    assert all(torch.equal(y, runs[0][0]) for y, _ in runs)
    assert all(torch.equal(g[name], runs[0][1][name]) for _, g in runs for name in ("x", "mask"))
