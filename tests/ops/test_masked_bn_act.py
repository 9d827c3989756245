"""masked_bn_act: values, gradients, statistics, and its behaviour under torch."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune import ops, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(4, 3), (2, 1), (3, 5, 7, 7), (2, 8, 20, 20), (8, 4, 1, 1), (3, 300, 2, 2), (2, 3, 700), (2, 3, 4, 5, 6)]
NAMES = ("x", "weight", "bias", "mask")


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    mask: Tensor
    dy: Tensor

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: torch.dtype, seed: int, rows: bool = False) -> "Case":
        random = torch.Generator().manual_seed(seed)
        x, dy = torch.randn(2, *shape, generator=random, dtype=torch.float64).to(dtype)
        if rows and x.dim() == 4:
            x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
        real = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias, mean, variance, mask = torch.randn(5, shape[1], generator=random, dtype=torch.float64).to(real)
        mask[::3] = 0
        return cls(2 * x + 0.5, weight, bias, mean, variance.exp(), mask, dy)

    def to(self, target: torch.dtype | str) -> "Case":
        return Case(*(tensor.to(target).clone() for tensor in vars(self).values()))

    @property
    def bn(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.bias, self.running_mean, self.running_var

    def run(self, function, **options) -> dict[str, Tensor]:
        """Return the result, all gradients, and the statistics afterwards."""
        case = self.to(self.x.device.type)
        inputs = [getattr(case, name).requires_grad_() for name in NAMES]
        y = function(case.x, case.bn, case.mask, **options)
        gradients = torch.autograd.grad(y, inputs, case.dy)
        statistics = {"running_mean": case.running_mean, "running_var": case.running_var}
        return {"y": y.detach(), **dict(zip(NAMES, gradients, strict=True)), **statistics}


# The exact results are float64, too: there 100 units are allowed.
UNIT = {torch.float64: 100 * 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_as_exact_as_torch(case: Case, slack: float = 1.0, **options) -> None:
    """Allow twice the error of plain torch in the same dtype, against float64.

    Torch's result may be exact by chance: one rounding of every term of a sum is allowed, too.
    """
    exact = case.to(torch.float64).run(reference.masked_bn_act, **options)
    plain, ours = case.run(reference.masked_bn_act, **options), case.run(ops.masked_bn_act, **options)
    for name, value in ours.items():
        expected = exact[name]
        assert value.dtype == plain[name].dtype
        assert value.shape == expected.shape
        error, torch_error = (value.double() - expected).abs(), (plain[name].double() - expected).abs()
        terms = 1 if value.dim() > 1 else case.x.numel() // case.x.size(1)
        floor = 8 * slack * UNIT[case.x.dtype] * max(expected.abs().max().item(), terms**0.5)
        assert error.max() <= 2 * torch_error.max() + floor, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, rows, training, device):
    for seed, activation in enumerate(ACTIVATIONS):
        case = Case.make(shape, dtype, seed, rows).to(device)
        assert_as_exact_as_torch(case, activation=activation, training=training)


shapes = st.one_of(
    st.tuples(st.integers(2, 9), st.integers(1, 40)),
    st.tuples(st.integers(2, 5), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
)


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(0, 2**32), st.booleans(), st.sampled_from(ACTIVATIONS), st.booleans())
def test_values_of_random_shapes(shape, seed, rows, activation, training):
    # The gradient through the statistics of two values cancels completely, in torch's kernel and in ours.
    case = Case.make(shape, torch.float64, seed, rows)
    assert_as_exact_as_torch(case, slack=100, activation=activation, training=training, eps=1e-2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, soft, training):
    case = Case.make((3, 4, 3, 2), torch.float64, seed=1)
    mask = torch.tensor([0.3, 1.0, 0.0, 0.7] if soft else [0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (case.x, case.weight, case.bias, mask)]

    def function(x, weight, bias, mask):
        statistics = case.running_mean.clone(), case.running_var.clone()
        return ops.masked_bn_act(x, (weight, bias, *statistics), mask, activation=activation, training=training)

    assert torch.autograd.gradcheck(function, inputs, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_mask_gradient_is_straight_through_for_closed_channels(training):
    case = Case.make((5, 3, 6, 6), torch.float64, seed=2)
    case.mask.zero_()
    result = case.run(ops.masked_bn_act, training=training)
    opened = case.to(torch.float64)
    opened.mask.fill_(1)
    r = opened.run(ops.masked_bn_act, training=training)["y"]
    assert (result["y"] == 0).all()
    assert (result["x"] == 0).all()
    torch.testing.assert_close(result["mask"], (case.dy * r).sum((0, 2, 3)))
    assert (result["mask"] != 0).all()


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_are_torchs(momentum):
    case = Case.make((5, 6, 7, 7), torch.float32, seed=3)
    ours, torchs = (
        case.run(function, training=True, momentum=momentum)
        for function in (ops.masked_bn_act, reference.masked_bn_act)
    )
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], torchs[name])


def test_running_statistics_move_without_gradients_and_where_the_mask_is_0():
    case = Case.make((5, 6, 7, 7), torch.float32, seed=4)
    case.mask.zero_()
    expected = case.run(reference.masked_bn_act, training=True)
    with torch.no_grad():
        ops.masked_bn_act(case.x, case.bn, case.mask, training=True)
    torch.testing.assert_close(case.running_mean, expected["running_mean"])
    torch.testing.assert_close(case.running_var, expected["running_var"])


@pytest.mark.parametrize("training", [False, True])
def test_arguments_that_may_be_missing(training):
    case = Case.make((4, 3, 5, 5), torch.float64, seed=5)
    bn = None, None, case.running_mean, case.running_var
    frozen = None, None, case.running_mean.clone(), case.running_var.clone()
    ours = ops.masked_bn_act(case.x, bn, training=training, activation=None)
    torch.testing.assert_close(ours, reference.masked_bn_act(case.x, frozen, training=training, activation=None))
    if training:
        nothing = None, None, None, None
        assert torch.equal(ops.masked_bn_act(case.x, nothing, training=True, activation=None), ours)


def test_only_required_gradients_are_computed():
    case = Case.make((4, 3, 5, 5), torch.float32, seed=6)
    expected = {training: case.run(ops.masked_bn_act, training=training) for training in (False, True)}
    for training, name in [(t, n) for t in (False, True) for n in NAMES]:
        alone = case.to("cpu")
        getattr(alone, name).requires_grad_()
        ops.masked_bn_act(alone.x, alone.bn, alone.mask, training=training).backward(alone.dy)
        assert torch.equal(getattr(alone, name).grad, expected[training][name])
        assert all(getattr(alone, other).grad is None for other in NAMES if other != name)


def test_the_input_is_saved_only_if_it_is_needed():
    case = Case.make((4, 3, 5, 5), torch.float32, seed=7)
    case.mask.requires_grad_()
    y = ops.masked_bn_act(case.x.requires_grad_(), case.bn, case.mask)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == case.x.shape]
    assert len(saved) == 1
    assert saved[0].data_ptr() != case.x.data_ptr()


def test_memory_format_is_kept_and_strided_inputs_are_copied():
    case = Case.make((4, 6, 5, 5), torch.float32, seed=8)
    expected = ops.masked_bn_act(case.x, case.bn, case.mask)
    last = ops.masked_bn_act(case.x.to(memory_format=torch.channels_last), case.bn, case.mask)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, expected)
    for strided in (case.x.transpose(2, 3).contiguous().transpose(2, 3), case.x.repeat(1, 1, 1, 2)[..., :5]):
        assert not strided.is_contiguous()
        assert torch.equal(ops.masked_bn_act(strided, case.bn, case.mask), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3), (3, 2, 0, 4)])
def test_without_elements(shape, training):
    case = Case.make(shape, torch.float32, seed=9)
    result = case.run(ops.masked_bn_act, training=training)
    assert result["y"].shape == shape
    assert (result["mask"] == 0).all()
    assert torch.equal(result["running_mean"], case.running_mean)
    assert torch.equal(result["running_var"], case.running_var)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_of_the_half_dtype_are_widened(dtype):
    case = Case.make((4, 3, 5, 5), dtype, seed=10)
    half = Case(case.x, *(t.to(dtype) for t in (*case.bn, case.mask)), case.dy)
    result = half.run(ops.masked_bn_act, training=True)
    widened = Case(case.x, *(t.float() for t in (*half.bn, half.mask)), case.dy).run(ops.masked_bn_act, training=True)
    assert torch.equal(result["y"], widened["y"])
    for name in ("weight", "bias", "mask", "running_mean", "running_var"):
        assert result[name].dtype == dtype
    for name in ("weight", "bias", "mask"):
        assert torch.equal(result[name], widened[name].to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_nothing(device):
    case = Case.make((4, 3, 5, 5), torch.bfloat16, seed=11).to(device)
    with torch.autocast(device, torch.bfloat16):
        mixed = ops.masked_bn_act(case.x, case.bn, case.mask)
        full = ops.masked_bn_act(case.x.float(), case.bn, case.mask)
    assert mixed.dtype == torch.bfloat16
    assert full.dtype == torch.float32
    assert torch.equal(mixed, ops.masked_bn_act(case.x, case.bn, case.mask))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training, device):
    case = Case.make((4, 6, 5, 5), torch.float32, seed=12, rows=True).to(device)
    compiled = torch.compile(ops.masked_bn_act, fullgraph=True, backend="aot_eager")
    expected = case.run(ops.masked_bn_act, training=training, activation="silu")
    result = case.run(compiled, training=training, activation="silu")
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=0, atol=0)


class Model(torch.nn.Module):
    def __init__(self, training: bool) -> None:
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(6)
        self.mask = torch.nn.Parameter(torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 2.0]))
        self.batch_statistics = training

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var
        return ops.masked_bn_act(x, bn, self.mask, training=self.batch_statistics)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict, training):
    model = Model(training)
    x = torch.randn(4, 6, 5, 5)
    exported = torch.export.export(model, (x,), strict=strict).module()
    expected = Model(training)(x)
    assert torch.equal(exported(x), expected)
    moved = dict(exported.named_buffers())["bn.running_mean"]
    assert torch.equal(moved, torch.zeros(6)) == (not training)


X = torch.randn(4, 3, 5, 5)
BN = (torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, BN), {"activation": "gelu"}, ValueError, "activation: got 'gelu', needs one of identity, relu, relu6"),
        ((X.long(), BN), {}, TypeError, "x: got dtype int64, needs one of float32"),
        ((X[0, 0, 0], BN), {}, ValueError, r"x: got shape \[5\], needs \[N, C\]"),
        ((X, (BN[0].double(), *BN[1:])), {}, TypeError, "weight: got dtype float64, needs float32"),
        ((X, (BN[0], BN[1][:2], *BN[2:])), {}, ValueError, r"bias: got shape \[2\], needs \[3\] \(one number"),
        ((X, (*BN[:2], BN[2].half(), BN[3])), {}, TypeError, "running_mean: got dtype float16, needs float32"),
        ((X, (*BN[:3], BN[3][:1])), {}, ValueError, r"running_var: got shape \[1\], needs \[3\]"),
        ((X, (*BN[:3], BN[3][:1])), {"training": True}, ValueError, r"running_var: got shape \[1\], needs \[3\]"),
        ((X, BN, torch.ones(4)), {}, ValueError, r"mask: got shape \[4\], needs \[3\]"),
        ((X, BN, torch.ones(3, 1)), {}, ValueError, r"mask: got shape \[3, 1\], needs \[3\]"),
        ((X, BN, torch.ones(3).bool()), {}, TypeError, "mask: got dtype bool, needs float32"),
        ((X.half(), BN, torch.ones(3).bfloat16()), {}, TypeError, "mask: got dtype bfloat16, needs float16 or float32"),
        ((X, (*BN[:2], None, None)), {}, ValueError, "bn: got no running statistics, needs them unless training=True"),
        ((X, (*BN[:3], None)), {"training": True}, ValueError, "bn: got one of running_mean and running_var"),
        ((X, BN), {"training": True, "momentum": None}, ValueError, "momentum: got None, needs a number"),
        ((X[:1, :, :1, :1], BN), {"training": True}, ValueError, "Expected more than 1 value per channel when trainin"),
    ],
)
def test_refusals(arguments, options, error, message):
    before = [t.clone() for t in BN]
    with pytest.raises(error, match=message):
        ops.masked_bn_act(*arguments, **options)
    assert all(torch.equal(*pair) for pair in zip(BN, before, strict=True))
