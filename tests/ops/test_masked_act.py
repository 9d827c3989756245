"""masked_act, the passes around a convolution: values against float64, views, and the memory around them."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune import _C
from fastprune.ops.activations import ACTIVATIONS
from fastprune.ops.masked_act import (
    masked_act,
    masked_act_backward,
    masked_act_in_place,
    masked_act_saving_in_place,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FUNCTIONS = {
    "identity": lambda z: z.clone(),
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
# Both sides of every path: short planes (256) and long ones, one line and its rest, many chunks, many channel tiles.
SHAPES = [
    (3, 5),
    (1, 1),
    (70, 4, 1, 1),
    (3, 5, 7, 7),
    (2, 300, 20, 20),
    (5, 1, 9, 9),
    (2, 3, 40_000),
    (33, 210, 3, 3),
    (2, 3, 4, 5, 6),
    (300, 17, 5, 5),
    (2, 5000, 1, 2),
    (3, 2, 16, 16),
    (3, 2, 257),
    (0, 4, 2, 2),
    (2, 0, 3, 3),
    (2, 3, 0, 3),
]


def real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def along(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def to_rows(x: Tensor) -> Tensor:
    """Copy into channels_last, for any rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@dataclass
class Case:
    x: Tensor
    dy: Tensor
    scale: Tensor
    shift: Tensor
    mask: Tensor
    centre: Tensor
    slope: Tensor
    offset: Tensor

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: torch.dtype, seed: int, rows: bool = False) -> "Case":
        random = torch.Generator().manual_seed(seed)
        x, dy = (2 * torch.randn(2, *shape, generator=random, dtype=torch.float64)).to(dtype)
        vectors = torch.randn(6, shape[1], generator=random, dtype=torch.float64).to(real(dtype))
        vectors[2, ::3] = 0  # closed channels
        return cls(*(to_rows(t) if rows and x.dim() > 2 else t for t in (x, dy)), *vectors)

    def to(self, target: torch.dtype | str) -> "Case":
        return Case(*(tensor.to(target) for tensor in vars(self).values()))

    def eager(self, activation: str) -> dict[str, Tensor]:
        """Compute in plain torch, in the dtype of the case; errors are compared with its errors."""
        x = self.x
        scale, shift, mask, centre = (along(v, x) for v in (self.scale, self.shift, self.mask, self.centre))
        z = (x * scale + shift).to(x.dtype).requires_grad_()
        r = FUNCTIONS[activation](z)
        (dz,) = torch.autograd.grad(r, z, (self.dy * mask).to(x.dtype))
        dims = [0, *range(2, x.dim())]
        adjusted = dz * scale + (x - centre) * along(self.slope, x) + along(self.offset, x)
        return {
            "y": (r * mask).detach().to(x.dtype),
            "dx": (dz * scale).to(x.dtype),
            "adjusted": adjusted.to(x.dtype),
            "dmask": (self.dy * r).detach().to(self.mask.dtype).sum(dims),
            "dshift": dz.to(self.mask.dtype).sum(dims),
            "dscale": (dz * (x - centre)).to(self.mask.dtype).sum(dims),
        }

    def ours(self, activation: str) -> dict[str, Tensor]:
        y, saved = masked_act(self.x, self.scale, self.shift, self.mask, activation=activation, want_saved=True)
        known = {"activation": activation, "x": self.x, "centre": self.centre}
        dx, dmask, dshift, dscale = masked_act_backward(
            self.dy, saved, self.mask, self.scale, want_dmask=True, want_dshift=True, want_dscale=True, **known
        )
        adjusted, *_ = masked_act_backward(
            self.dy, saved, self.mask, self.scale, slope=self.slope, offset=self.offset, **known
        )
        return {"y": y, "dx": dx, "adjusted": adjusted, "dmask": dmask, "dshift": dshift, "dscale": dscale}


# The exact results are float64, too: there 100 units are allowed.
UNIT = {torch.float64: 100 * 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_as_exact_as_torch(case: Case, activation: str) -> None:
    """Allow twice the error of plain torch in the same dtype, against float64.

    Torch's result may be exact by chance: one rounding of every term of a sum is allowed, too.
    """
    exact, eager, ours = case.to(torch.float64).eager(activation), case.eager(activation), case.ours(activation)
    for name, value in ours.items():
        expected = exact[name]
        assert value.shape == expected.shape
        if value.numel() == 0:
            continue
        assert value.isfinite().all()
        error, plain = (value.double() - expected).abs(), (eager[name].double() - expected).abs()
        terms = 1 if value.dim() > 1 else case.x.numel() // case.x.size(1)
        floor = 8 * UNIT[case.x.dtype] * max(expected.abs().max().item(), terms**0.5)
        assert error.max() <= 2 * plain.max() + floor, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, rows, device):
    for number, activation in enumerate(ACTIVATIONS):
        case = Case.make(shape, dtype, seed=number, rows=rows)
        assert_as_exact_as_torch(case.to(device), activation)


shapes = st.one_of(
    st.tuples(st.integers(0, 9), st.integers(1, 40)),
    st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(1, 400)),
    st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
)


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(0, 2**32), st.booleans(), st.sampled_from(DTYPES), st.sampled_from(list(ACTIVATIONS)))
def test_values_of_random_shapes(shape, seed, rows, dtype, activation):
    assert_as_exact_as_torch(Case.make(shape, dtype, seed, rows), activation)


@pytest.mark.parametrize("rows", [False, True])
def test_results_have_the_memory_format_of_the_input(rows):
    case = Case.make((3, 5, 4, 6), torch.float32, seed=1, rows=rows)
    for name in ("y", "dx", "adjusted"):
        assert case.ours("relu")[name].stride() == case.x.stride()


def test_formats_may_differ():
    case = Case.make((3, 5, 4, 6), torch.float32, seed=2)
    expected = case.ours("relu")
    case.dy = to_rows(case.dy)
    mixed = case.ours("relu")
    assert all(torch.equal(mixed[name], expected[name]) for name in expected)
    expanded = masked_act_backward(torch.ones(()).expand(3, 5, 4, 6), case.x, want_dmask=True)[1]
    torch.testing.assert_close(expanded, case.x.sum((0, 2, 3)))


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 30.0, 86.0, 90.0, 1e4, 3e38])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(activation, size):
    z = torch.tensor([[-size, size, -size / 3, size / 7]]).reshape(1, 1, 4)
    y, saved = masked_act(z, activation=activation, want_saved=True)
    dx, *_ = masked_act_backward(torch.ones_like(z), saved, activation=activation)
    exact = z.double().requires_grad_()
    expected = FUNCTIONS[activation](exact)
    expected.sum().backward()
    assert torch.allclose(y.double(), expected, rtol=4e-7, atol=1e-30 + 1e-37 * size)
    assert torch.allclose(dx.double(), exact.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation):
    """NaN goes through, an infinite gradient meets a derivative of 0, and derivatives at the kinks are torch's."""
    z = torch.tensor([torch.nan, -3.0, 0.0, 3.0, 6.0]).reshape(1, 1, 5)
    y, saved = masked_act(z, activation=activation, want_saved=True)
    assert y.isnan().flatten().tolist() == [True, False, False, False, False]
    gradient = torch.ones_like(z)
    gradient[0, 0, 1] = torch.inf if activation in ("relu", "relu6") else 1
    dx, *_ = masked_act_backward(gradient, saved, activation=activation)
    wanted = z.clone().requires_grad_()
    FUNCTIONS[activation](wanted).backward(gradient)
    torch.testing.assert_close(dx[..., 1:], wanted.grad[..., 1:])


def all_patterns() -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_widened_exactly(dtype, device):
    """The sum of one product with 1 is the value itself, in float32."""
    halves = all_patterns().view(dtype).reshape(1, -1).to(device)
    widened = masked_act_backward(torch.ones_like(halves), halves, activation="identity", want_dmask=True)[1]
    expected = halves[0].float()
    number = ~expected.isnan()
    assert torch.equal(widened[number], expected[number])
    assert widened[~number].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_are_rounded_to_the_nearest_even_half(dtype, device):
    """Round every half, the midpoints to its neighbours, the floats next to these midpoints, and random bits."""
    halves = all_patterns().view(dtype).float()
    above = (all_patterns().int() + 1).to(torch.int16).view(dtype).float()
    middle = (halves.double() / 2 + above.double() / 2).float()
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    candidates = [halves, middle, middle.nextafter(up), middle.nextafter(down)]
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    floats = torch.cat([*candidates, random.to(torch.int32).view(torch.float32)]).to(device)
    zeros = torch.full((1, len(floats)), -0.0, dtype=dtype, device=device)
    rounded = masked_act(zeros, shift=floats, activation="identity")[0][0]
    expected = floats.to(dtype)
    number = ~expected.isnan()
    assert torch.equal(rounded[number].view(torch.int16), expected[number].view(torch.int16))
    assert rounded[~number].isnan().all()


def test_same_bits_on_every_run_and_for_every_number_of_threads():
    before = torch.get_num_threads()
    cases = [
        Case.make((8, 40, 57, 31), torch.float32, seed=3),
        Case.make((8, 40, 57, 31), torch.float32, seed=3, rows=True),
        Case.make((64, 300, 7, 7), torch.bfloat16, seed=4),
    ]
    try:
        for case in cases:
            results = []
            for threads in (1, 2, 3, 8, 1, 8):
                torch.set_num_threads(threads)
                results.append(case.ours("relu"))
            for result, name in itertools.product(results, results[0]):
                assert torch.equal(result[name], results[0][name])
    finally:
        torch.set_num_threads(before)


GUARD = -77.0


def wide(x: Tensor, before: int, behind: int) -> tuple[Tensor, Tensor]:
    """Return a tensor with channels ``before`` and ``behind`` a copy of x, in its format, and the view of the copy."""
    shape = (x.size(0), before + x.size(1) + behind, *x.shape[2:])
    whole = torch.full(shape, GUARD, dtype=x.dtype)
    if not x.is_contiguous():
        whole = to_rows(whole)
    view = whole[:, before : before + x.size(1)]
    view.copy_(x)
    return whole, view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 7, 7), (2, 16, 20, 20), (2, 3, 1000), (40, 8, 2, 2)], ids=str)
def test_views_of_some_channels(shape, rows, dtype):
    """They are read and written in place, each with its own gaps, and only the view is written."""
    case = Case.make(shape, dtype, seed=5, rows=rows)
    expected = case.ours("relu")
    views = {name: wide(getattr(case, name), *gap) for name, gap in {"x": (0, 3), "dy": (1, 7)}.items()}
    case.x, case.dy = views["x"][1], views["dy"][1]
    result = case.ours("relu")
    assert all(torch.equal(result[name], expected[name]) for name in expected)

    wholes = {name: wide(torch.zeros_like(case.x), *gap) for name, gap in {"y": (2, 1), "saved": (8, 0)}.items()}
    y, saved = wholes["y"][1], wholes["saved"][1]
    _C.masked_act(case.x, case.scale, case.shift, case.mask, "relu", y, saved)
    assert torch.equal(y, expected["y"])
    whole_dx, dx = wide(torch.zeros_like(case.x), 4, 4)
    _C.masked_act_backward(
        case.dy, saved, None, case.mask, case.scale, None, None, None, "relu", dx, None, None, None, None
    )
    assert torch.equal(dx, expected["dx"])
    for whole, view in (*wholes.values(), (whole_dx, dx)):
        view.fill_(GUARD)
        assert (whole == GUARD).all()


@pytest.mark.parametrize("rows", [False, True])
def test_results_may_overwrite_inputs(rows):
    case = Case.make((3, 20, 9, 30), torch.float32, seed=6, rows=rows)
    expected = case.ours("relu")
    x = case.x.clone()
    _C.masked_act(x, case.scale, case.shift, case.mask, "relu", x, None)
    assert torch.equal(x, expected["y"])
    saved = case.x.clone()
    y = torch.empty_like(saved)
    _C.masked_act(saved, case.scale, case.shift, case.mask, "relu", y, saved)
    assert torch.equal(y, expected["y"])
    dy, dmask = case.dy.clone(), torch.empty_like(case.mask)
    _C.masked_act_backward(
        dy, saved, None, case.mask, case.scale, None, None, None, "relu", dy, dmask, None, None, None
    )
    assert torch.equal(dy, expected["dx"])
    assert torch.equal(dmask, expected["dmask"])
    _C.masked_act_backward(
        case.dy, saved, None, case.mask, case.scale, None, None, None, "relu", saved, None, None, None, None
    )
    assert torch.equal(saved, expected["dx"])


@pytest.mark.parametrize("rows", [False, True])
def test_results_may_overwrite_inputs_where_something_is_added(rows):
    case = Case.make((3, 20, 9, 30), torch.float32, seed=6, rows=rows)
    vectors = (case.scale, case.shift, case.mask)
    y, saved = masked_act(case.x, *vectors, residual=case.dy, want_saved=True)
    only = torch.empty_like(saved)
    _C.masked_act(case.x, *vectors, "relu", None, only, residual=case.dy)
    assert torch.equal(only, saved)
    assert torch.equal(masked_act_in_place(case.x.clone(), *vectors, residual=case.dy, activation="relu"), y)
    results = masked_act_saving_in_place(case.x.clone(), *vectors, residual=case.dy, activation="relu")
    assert torch.equal(results[0], y)
    assert torch.equal(results[1], saved)
    expected, *_ = masked_act_backward(case.x, saved, case.mask, case.scale, others=case.dy)
    dx = case.dy.clone()
    none = (None,) * 3
    _C.masked_act_backward(case.x, saved, None, case.mask, case.scale, *none, "relu", dx, *none, None, others=dx)
    assert torch.equal(dx, expected)


def test_columns_of_one_matrix_do_not_overlap():
    whole = to_rows(torch.randn(3, 12, 4, 4))
    expected = whole[:, :6].relu()
    _C.masked_act(whole[:, :6], None, None, None, "relu", whole[:, 6:], None)
    assert torch.equal(whole[:, 6:], expected)


@pytest.mark.parametrize("wants", [w for w in itertools.product([False, True], repeat=4) if any(w)])
def test_every_choice_of_gradients(wants):
    case = Case.make((3, 6, 5, 5), torch.float32, seed=7)
    names = ["dx", "dmask", "dshift", "dscale"]
    _, saved = masked_act(case.x, case.scale, case.shift, case.mask, activation="silu", want_saved=True)
    results = masked_act_backward(
        case.dy,
        saved,
        case.mask,
        case.scale,
        activation="silu",
        x=case.x if wants[3] else None,
        centre=case.centre,
        **{f"want_{name}": want for name, want in zip(names, wants, strict=True)},
    )
    expected = case.ours("silu")
    for name, want, result in zip(names, wants, results, strict=True):
        assert (result is not None) == want
        assert not want or torch.equal(result, expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [False, True])
def test_opcheck(dtype, rows):
    case = Case.make((2, 3, 4, 5), dtype, seed=8, rows=rows)
    kernel = torch.ops.fastprune._masked_act.default
    torch.library.opcheck(kernel, (case.x, case.scale, None, case.mask, case.dy, "silu", True))
    torch.library.opcheck(kernel, (case.x[:, :2], None, None, None, None, "relu", False))
    for name, more in (("_masked_act_in_place", ()), ("_masked_act_saving_in_place", (True,))):
        arguments = (case.x.clone(), case.scale, None, case.mask, case.dy, "silu", *more)
        torch.library.opcheck(getattr(torch.ops.fastprune, name).default, arguments)
    kernel = torch.ops.fastprune._masked_act_backward.default
    vectors = (case.mask, case.scale, case.centre, None, None)
    torch.library.opcheck(kernel, (case.dy, case.x, case.x, None, *vectors, "silu", [True, True, False, True]))
    vectors = (case.mask, case.scale, None, None, None)
    torch.library.opcheck(kernel, (case.dy, case.x, None, case.dy, *vectors, "silu", [True, True, False, False]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_residual_and_the_gradients_of_other_readers_are_added_without_rounding(activation, shape, dtype, device):
    for rows in (False, True):
        case = Case.make(shape, dtype, seed=10, rows=rows).to(device)
        x, added, vectors = case.x, case.dy, (case.scale, case.shift, case.mask)
        ours = masked_act(x, *vectors, residual=added, activation=activation, want_saved=True)
        wide = x.to(real(dtype)) * along(case.scale, x) + along(case.shift, x) + added.to(real(dtype))
        y, saved = masked_act(wide, mask=case.mask, activation=activation, want_saved=True)
        assert torch.equal(ours[0], y.to(dtype))
        assert torch.equal(ours[1], saved.to(dtype))
        assert torch.equal(masked_act(x, *vectors, residual=added, activation=activation)[0], ours[0])
        ours = masked_act_backward(
            x, ours[1], case.mask, case.scale, others=added, activation=activation, want_dmask=True
        )
        wide = x.to(real(dtype)) + added.to(real(dtype))
        theirs = masked_act_backward(
            wide, saved.to(dtype).to(real(dtype)), case.mask, case.scale, activation=activation, want_dmask=True
        )
        assert torch.equal(ours[0], theirs[0].to(dtype))
        if device == "cpu":  # on CUDA the width of vectors, which depends on the dtype, cuts the sums
            assert torch.equal(ours[1], theirs[1])
        else:
            torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("wants", [(True, False), (False, True), (True, True)])
def test_every_choice_of_gradients_beside_those_of_other_readers(wants):
    case = Case.make((3, 6, 5, 5), torch.float32, seed=7)
    known = {"others": case.x, "activation": "relu6"}
    whole = masked_act_backward(case.dy, case.x, case.mask, case.scale, want_dmask=True, **known)
    part = masked_act_backward(case.dy, case.x, case.mask, case.scale, want_dx=wants[0], want_dmask=wants[1], **known)
    for want, ours, theirs in zip(wants, part, whole, strict=False):
        assert torch.equal(ours, theirs) if want else ours is None


def test_a_residual_in_another_layout_is_brought_into_that_of_x():
    case = Case.make((3, 6, 5, 5), torch.float32, seed=7)
    expected = masked_act(case.x, residual=case.dy)[0]
    assert torch.equal(masked_act(case.x, residual=to_rows(case.dy))[0], expected)


def test_long_sums_keep_their_digits():
    """A running float32 sum of 10^7 terms would lose half of its digits."""
    ones = torch.ones(1, 1, 10_000_000)
    total = masked_act_backward(torch.full_like(ones, 0.1), ones, want_dx=False, want_dmask=True)[1]
    assert math.isclose(total.item(), torch.tensor(0.1).double().item() * 10_000_000, rel_tol=1e-6)
