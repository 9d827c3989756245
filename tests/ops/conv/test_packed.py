"""The CPU convolution with packed weights, called directly: values, bits, and the memory that it touches."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastprune import _C
from fastprune.ops.conv import packed as masked_conv
from fastprune.ops.conv.library import Geometry

INSTRUCTIONS = _C.masked_conv_instructions()
KERNELS = [(algorithm, instructions) for instructions in INSTRUCTIONS for algorithm in ("direct", "winograd")]
GUARD = 7.25  # the value around every result, which must not change
INF = math.inf

pytestmark = pytest.mark.skipif(not INSTRUCTIONS, reason="the kernels are not written for this processor")
kernels = pytest.mark.parametrize(("algorithm", "instructions"), KERNELS)


@dataclass(frozen=True)
class Case:
    """The sizes of a call, which reads `channels` and computes `rows` of those that the weight is packed for."""

    batch: int
    size: tuple[int, int]
    packed_channels: int
    packed_rows: int
    channels: int
    rows: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    gaps: tuple[int, int, int, int] = (0, 0, 0, 0)  # channels on each side of x, y, saved and residual in wider tensors
    shift: bool = True
    mask: bool = True
    residual: bool = True
    bounds: tuple[float, float] = (-INF, INF)
    results: tuple[bool, bool] = (True, True)  # y, saved
    seed: int = 0

    @property
    def window(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation

    @property
    def out(self) -> tuple[int, int]:
        first, second = (
            (self.size[d] + 2 * self.padding[d] - self.dilation[d] * (self.kernel[d] - 1) - 1) // self.stride[d] + 1
            for d in (0, 1)
        )
        return first, second


@st.composite
def cases(draw: st.DrawFn, *, winograd: bool = False) -> Case:
    def pair(strategy: st.SearchStrategy[int]) -> tuple[int, int]:
        return draw(strategy), draw(strategy)

    kernel = (3, 3) if winograd else pair(st.integers(1, 7))
    stride = (1, 1) if winograd else pair(st.integers(1, 3))
    dilation = (1, 1) if winograd else pair(st.integers(1, 3))
    spans = [dilation[d] * (kernel[d] - 1) + 1 for d in (0, 1)]
    padding = tuple(draw(st.integers(0, span - 1)) for span in spans)
    least = [max(1, spans[d] - 2 * padding[d]) for d in (0, 1)]
    size = tuple(least[d] + draw(st.integers(0, 13)) for d in (0, 1))
    packed_channels, packed_rows = pair(st.integers(1, 70))
    bounds = draw(st.sampled_from([(-INF, INF), (0.0, INF), (0.0, 6.0), (-0.5, 0.25)]))
    return Case(
        draw(st.integers(1, 3)), size, packed_channels, packed_rows,
        draw(st.integers(1, packed_channels) | st.just(packed_channels)),
        draw(st.integers(1, packed_rows) | st.just(packed_rows)),
        kernel, stride, padding, dilation,
        tuple(draw(st.sampled_from([0, 1, 5])) for _ in range(4)),
        draw(st.booleans()), draw(st.booleans()), draw(st.booleans()), bounds,
        draw(st.sampled_from([(True, True), (True, False), (False, True)])),
        draw(st.integers(0, 2**31)),
    )  # fmt: skip


def wide(batch: int, channels: int, size: tuple[int, int], gap: int) -> Tensor:
    """Return the inner channels of a channels_last tensor of guards, with a line of guards before and behind it."""
    height, width = size
    pitch = channels + 2 * gap
    whole = torch.full((pitch * (batch * height * width + 2),), GUARD)
    strides = (height * width * pitch, 1, width * pitch, pitch)
    return whole.as_strided((batch, channels, height, width), strides, pitch + gap)


def around(view: Tensor) -> Tensor:
    """Return the memory of the view, with guards in place of the view itself."""
    whole = torch.empty(0).set_(view.untyped_storage()).clone()
    whole.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(GUARD)
    return whole


@dataclass(frozen=True)
class Call:
    """The arguments of a case."""

    case: Case
    x: Tensor
    weight: Tensor
    shift: Tensor | None
    mask: Tensor | None
    residual: Tensor | None

    @classmethod
    def of(cls, case: Case) -> Call:
        random = torch.Generator().manual_seed(case.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=random)

        x = wide(case.batch, case.channels, case.size, case.gaps[0])
        x.copy_(normal(*x.shape))
        weight = normal(case.packed_rows, case.packed_channels, *case.kernel)
        residual = wide(case.batch, case.rows, case.out, case.gaps[3]) if case.residual else None
        if residual is not None:
            residual.copy_(normal(*residual.shape))
        shift = normal(case.rows) if case.shift else None
        mask = normal(case.rows) * (torch.rand(case.rows, generator=random) < 0.7) if case.mask else None
        return cls(case, x, weight, shift, mask, residual)

    def run(self, algorithm: str, instructions: str, threads: int = 1, packed: Tensor | None = None) -> list[Tensor]:
        """Return the wanted results; the memory around them must not have changed."""
        case = self.case
        packed = pack(self.weight, algorithm, instructions) if packed is None else packed
        y, saved = (
            wide(case.batch, case.rows, case.out, gap) if wanted else None
            for gap, wanted in zip(case.gaps[1:3], case.results, strict=True)
        )
        size = tuple(self.weight.shape)
        vectors = self.shift, self.mask, self.residual
        _C.masked_conv(
            algorithm, instructions, self.x, packed, size, *case.window, *vectors, *case.bounds, y, saved, threads
        )
        results = [result for result in (y, saved) if result is not None]
        for result in results:
            assert (around(result) == GUARD).all()
        return results

    def sums(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight[: self.case.rows, : self.case.channels].to(dtype)
        return F.conv2d(self.x.to(dtype), weight, None, *self.case.window)

    def expected(self, dtype: torch.dtype) -> list[Tensor]:
        z = self.sums(dtype)
        if self.shift is not None:
            z += self.shift.to(dtype).view(-1, 1, 1)
        if self.residual is not None:
            z += self.residual.to(dtype)
        r = z.clamp(*self.case.bounds)
        y = r if self.mask is None else r * self.mask.to(dtype).view(-1, 1, 1)
        return [result for result, wanted in zip((y, r), self.case.results, strict=True) if wanted]

    def magnitude(self, algorithm: str) -> Tensor:
        """Return the sum of the absolute values of the terms of each output.

        Winograd's transforms add pixels and taps of the neighbours, which cancel; then it is one bound for all outputs.
        """
        x, weight = self.x.double().abs(), self.weight[: self.case.rows, : self.case.channels].double().abs()
        if algorithm == "winograd":
            total = (weight.sum((2, 3)) @ x.amax((0, 2, 3))).view(-1, 1, 1).expand(self.case.batch, -1, *self.case.out)
        else:
            total = F.conv2d(x, weight, None, *self.case.window)
        total = total if self.shift is None else total + self.shift.double().abs().view(-1, 1, 1)
        total = total if self.residual is None else total + self.residual.double().abs()
        return total if self.mask is None else total * self.mask.double().abs().view(-1, 1, 1).clamp(min=1)


def pack(weight: Tensor, algorithm: str, instructions: str) -> Tensor:
    return masked_conv.pack(weight, Geometry(), algorithm=algorithm, instructions=instructions).data


def check_values(call: Call, results: list[Tensor], algorithm: str) -> None:
    """Allow twice the error of torch's own float32, or a few roundings of the sum's terms."""
    floor = 4 * 2.0**-24 * call.magnitude(algorithm)
    for result, plain, exact in zip(results, call.expected(torch.float32), call.expected(torch.float64), strict=True):
        error = (result.double() - exact).abs()
        worst = (plain.double() - exact).abs().max().item()
        assert (error <= floor.clamp(min=2 * worst)).all()


def random_cases(algorithm: str, count: int):
    return lambda test: seed(0)(settings(max_examples=count, deadline=None, database=None)(
        given(case=cases(winograd=algorithm == "winograd"))(test)
    ))  # fmt: skip


@random_cases("direct", 120)
def test_direct_values(case):
    call = Call.of(case)
    results = [call.run("direct", instructions) for instructions in INSTRUCTIONS]
    check_values(call, results[0], "direct")
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@random_cases("winograd", 120)
def test_winograd_values(case):
    call = Call.of(case)
    results = [call.run("winograd", instructions) for instructions in INSTRUCTIONS]
    check_values(call, results[0], "winograd")
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def error_of(call: Call, algorithm: str) -> float:
    (result,) = call.run(algorithm, INSTRUCTIONS[0])
    return (result.double() - call.expected(torch.float64)[0]).square().mean().sqrt().item()


@pytest.mark.parametrize("channels", [16, 64, 256])
def test_winograds_error_is_less_than_twice_that_of_the_direct_algorithm(channels):
    case = Case(2, (14, 14), channels, 64, channels, 64, (3, 3), padding=(1, 1), results=(True, False))
    call = Call.of(replace(case, shift=False, mask=False, residual=False))
    assert error_of(call, "winograd") <= 2 * error_of(call, "direct")


LARGE = {
    "pointwise": Case(2, (19, 17), 48, 70, 48, 70, (1, 1)),
    "strided": Case(2, (33, 31), 24, 40, 24, 40, (5, 3), (2, 3), (2, 0)),
    "padded": Case(3, (40, 28), 32, 66, 32, 66, (3, 3), (1, 1), (1, 1)),
    "single line": Case(1, (1, 300), 20, 35, 20, 35, (1, 3), (1, 1), (0, 2)),
    "dilated": Case(1, (30, 30), 70, 70, 70, 70, (3, 3), (1, 1), (5, 5), (5, 5)),
    "several tasks": Case(8, (56, 56), 64, 128, 64, 128, (1, 1), residual=False),
    "few pixels, many rows": Case(1, (7, 7), 256, 512, 256, 512, (3, 3), (1, 1), (1, 1)),
    "larger than the caches": Case(8, (64, 64), 16, 80, 16, 80, (3, 3), (1, 1), (1, 1)),  # 10 MiB, written past them
}


def algorithms_of(case: Case) -> list[str]:
    square = (case.kernel, case.stride, case.dilation) == ((3, 3), (1, 1), (1, 1))
    return ["direct", "winograd"] if square else ["direct"]


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_same_bits_for_every_number_of_threads(name, instructions):
    call = Call.of(LARGE[name])
    for algorithm in algorithms_of(call.case):
        first = call.run(algorithm, instructions)
        check_values(call, first, algorithm)
        for threads in (1, 2, 3, 8, 100):
            assert all(map(torch.equal, first, call.run(algorithm, instructions, threads)))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_rows_that_do_not_fill_a_vector_bypass_the_caches(kernel, instructions, monkeypatch):
    """Write 9 MiB: 69 of 80 channels, whose pixels begin at cache lines."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, 64, 64, generator=random).to(memory_format=torch.channels_last)
    weight = torch.randn(80, 16, kernel, kernel, generator=random)
    geometry = Geometry(padding=(kernel // 2, kernel // 2))
    plain, exact = (
        F.conv2d(x.to(dtype), weight.to(dtype), padding=geometry.padding) for dtype in (x.dtype, torch.double)
    )
    worst = (plain.double() - exact)[:, :69].abs().max()
    for algorithm in ("direct", "winograd") if kernel == 3 else ("direct",):
        packed = masked_conv.pack(weight, geometry, algorithm=algorithm, instructions=instructions)
        results = []
        for threads in (1, 2, 3, 8):
            monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
            y, saved = masked_conv.convolve(x, packed, 69, saves=True)
            assert torch.equal(y, saved)
            results.append(y)
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert not results[0][:, 69:].any()
        assert (results[0].double() - exact)[:, :69].abs().max() <= 2 * worst


@pytest.mark.parametrize("name", LARGE)
def test_an_output_does_not_depend_on_how_many_are_computed(name):
    case = LARGE[name]
    whole = Call.of(case)
    for algorithm in algorithms_of(case):
        packed = pack(whole.weight, algorithm, INSTRUCTIONS[0])
        results = whole.run(algorithm, INSTRUCTIONS[0], packed=packed)
        for rows in (1, 8, 16, 17, 33, case.rows - 1):
            cut = replace(
                whole,
                case=replace(case, rows=rows),
                shift=whole.shift[:rows],
                mask=whole.mask[:rows],
                residual=None if whole.residual is None else whole.residual[:, :rows],
            )
            for part, result in zip(cut.run(algorithm, INSTRUCTIONS[0], packed=packed), results, strict=True):
                assert torch.equal(part, result[:, :rows])
        one = replace(whole, case=replace(case, batch=1), x=whole.x[:1],
                      residual=None if whole.residual is None else whole.residual[:1])  # fmt: skip
        for part, result in zip(one.run(algorithm, INSTRUCTIONS[0], packed=packed), results, strict=True):
            assert torch.equal(part, result[:1])


@kernels
def test_closed_channels_are_like_absent_ones(algorithm, instructions):
    call = Call.of(Case(2, (6, 5), 50, 20, 37, 20, (3, 3), padding=(1, 1)))
    narrow = replace(call, weight=call.weight[:, :37].contiguous())
    assert all(map(torch.equal, call.run(algorithm, instructions), narrow.run(algorithm, instructions)))


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_nan_and_infinity_reach_the_same_outputs_as_in_torch(instructions, value):
    plain = Case(2, (9, 8), 5, 20, 5, 20, (3, 3), padding=(1, 1))
    for case in (plain, replace(plain, bounds=(0.0, 6.0)), replace(plain, kernel=(1, 1), padding=(0, 0))):
        call = Call.of(case)
        call.x[1, 3, 4, 2] = value
        for result, expected in zip(call.run("direct", instructions), call.expected(torch.float64), strict=True):
            assert torch.equal(result.isnan(), expected.isnan())
            finite = ~expected.isnan()
            torch.testing.assert_close(result[finite], expected[finite].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_nan_and_infinity_reach_no_other_outputs_by_winograd(instructions, value):
    call = Call.of(Case(2, (9, 8), 5, 20, 5, 20, (3, 3), padding=(1, 1), results=(True, False), mask=False))
    call.x[1, 3, 4, 2] = value
    (result,), (exact,) = call.run("winograd", instructions), call.expected(torch.float64)
    reached = torch.zeros_like(result, dtype=torch.bool)
    reached[1, :, 3:6, 1:4] = True
    assert torch.equal(~result.isfinite(), reached)
    assert (result.isnan() | (result == exact) | ~torch.tensor(value).isinf())[reached].all()
    torch.testing.assert_close(result[~reached], exact[~reached].float(), rtol=1e-4, atol=1e-4)


@kernels
def test_a_nan_in_shift_or_mask_or_residual_stays_in_its_channel(algorithm, instructions):
    call = Call.of(Case(1, (4, 4), 3, 40, 3, 40, (3, 3), padding=(1, 1), bounds=(0.0, 6.0)))
    call.shift[33], call.mask[5], call.residual[0, 20, 1, 1] = torch.nan, torch.nan, torch.nan
    y, saved = call.run(algorithm, instructions)
    assert set(y.isnan().nonzero()[:, 1].tolist()) == {33, 5, 20}
    assert set(saved.isnan().nonzero()[:, 1].tolist()) == {33, 20}
    assert y.isnan().sum() == 16 + 16 + 1


@given(case=cases(), winograd=st.booleans())
@seed(0)
@settings(max_examples=60, deadline=None, database=None)
def test_the_transposed_weight_gives_the_gradient_of_x(case, winograd):
    case = replace(case, stride=(1, 1), channels=case.packed_channels, rows=case.packed_rows)
    if winograd:
        size = tuple(max(side, 3) for side in case.size)
        case = replace(case, kernel=(3, 3), dilation=(1, 1), size=size, padding=tuple(p % 3 for p in case.padding))
    call = Call.of(case)
    x = call.x.double().requires_grad_()
    random = torch.Generator().manual_seed(case.seed)
    dy = torch.randn(case.batch, case.rows, *case.out, generator=random).contiguous(memory_format=torch.channels_last)
    sums = F.conv2d(x, call.weight.double(), None, *case.window)
    (expected,) = torch.autograd.grad(sums, x, dy.double())
    transposed = Geometry(*case.window).transposed(call.weight)
    assert transposed is not None
    weight, magnitude = call.weight.double().abs(), dy.double().abs()
    if winograd:  # it adds pixels and taps of the neighbours, which cancel
        terms = (magnitude.amax((0, 2, 3)) @ weight.sum((2, 3))).view(-1, 1, 1)
    else:
        (terms,) = torch.autograd.grad(F.conv2d(x, weight, None, *case.window), x, magnitude)
    for instructions in INSTRUCTIONS:
        algorithm = "winograd" if winograd else "direct"
        packed = masked_conv.pack(
            call.weight, transposed, transposed=True, algorithm=algorithm, instructions=instructions
        )
        dy = dy.as_strided(dy.shape, (dy[0].numel(), 1, dy.shape[3] * dy.shape[1], dy.shape[1]))
        dx = masked_conv.convolve(dy, packed, case.packed_channels)[0]
        assert ((dx.double() - expected).abs() <= 2.0**-20 * terms + 1e-30).all()


class Page:
    """Floats at the end (or the start) of a page; an access to the page before or behind it crashes."""

    def __init__(self, values: Tensor, *, at_end: bool = True) -> None:
        page = mmap.PAGESIZE
        room = -(-4 * values.numel() // page) * page
        self.memory = mmap.mmap(-1, room + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start in (address, address + page + room):
            assert protect(start, page, 0) == 0, os.strerror(ctypes.get_errno())
        offset = page + (room - 4 * values.numel() if at_end else 0)
        self.floats = torch.frombuffer(self.memory, dtype=torch.float32, count=values.numel(), offset=offset)
        self.floats.copy_(values.flatten())

    def pixels(self, like: Tensor) -> Tensor:
        batch, channels, height, width = like.shape
        return self.floats.view(batch, height, width, channels).permute(0, 3, 1, 2)


@pytest.mark.skipif(os.name != "posix", reason="needs mprotect")
@pytest.mark.parametrize("at_end", [True, False])
@kernels
def test_no_memory_is_touched_outside_of_the_arguments(algorithm, instructions, at_end):
    kinds = [Case(1, (4, 5), 33, 39, 33, 39, (3, 3), padding=(1, 1)), Case(2, (5, 4), 3, 1, 3, 1, (3, 3))]
    if algorithm == "direct":
        kinds += [Case(1, (3, 5), 7, 17, 7, 17, (1, 1)), Case(1, (5, 7), 2, 49, 2, 49, (2, 3), (2, 2), (0, 2))]
    for case in kinds:
        call = Call.of(case)
        expected = call.run(algorithm, instructions)
        packed = pack(call.weight, algorithm, instructions)
        lent = {name: Page(value, at_end=at_end) for name, value in (
            ("x", call.x.permute(0, 2, 3, 1)), ("weight", call.weight), ("packed", torch.zeros_like(packed)),
            ("shift", call.shift), ("mask", call.mask), ("residual", call.residual.permute(0, 2, 3, 1)),
            ("y", expected[0] * 0), ("saved", expected[1] * 0),
        )}  # fmt: skip
        size = tuple(call.weight.shape)
        scale = Page(torch.ones(case.rows), at_end=at_end)
        _C.masked_conv_pack(
            algorithm, instructions, lent["weight"].floats.view(size), scale.floats, False, lent["packed"].floats, 1
        )
        assert torch.equal(lent["packed"].floats, packed)
        y, saved = (lent[name].pixels(expected[0]) for name in ("y", "saved"))
        _C.masked_conv(
            algorithm, instructions, lent["x"].pixels(call.x), lent["packed"].floats, size, *case.window,
            lent["shift"].floats, lent["mask"].floats, lent["residual"].pixels(expected[0]), *case.bounds, y, saved, 1,
        )  # fmt: skip
        assert torch.equal(y, expected[0])
        assert torch.equal(saved, expected[1])


@kernels
def test_kept_memory_serves_calls_of_other_sizes(algorithm, instructions):
    small = Call.of(Case(1, (5, 5), 3, 4, 3, 4, (3, 3), padding=(1, 1)))
    large = Call.of(Case(2, (20, 20), 70, 20, 70, 20, (3, 3), padding=(1, 1)))
    large.x.fill_(torch.nan)
    before = small.run(algorithm, instructions)
    large.run(algorithm, instructions)
    assert all(map(torch.equal, small.run(algorithm, instructions), before))


def test_far_apart_taps_use_memory_for_one_call():
    # The copy of x, 3 * 4 * 1500^2 floats, is too large to keep for later calls.
    call = Call.of(Case(1, (2, 3), 3, 4, 3, 4, (3, 3), padding=(1500, 1500), dilation=(1500, 1500)))
    check_values(call, call.run("direct", INSTRUCTIONS[0]), "direct")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@kernels
def test_works_in_a_forked_process(algorithm, instructions):
    call = Call.of(Case(2, (12, 12), 16, 32, 16, 32, (3, 3), padding=(1, 1)))
    expected = call.run(algorithm, instructions)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(map(torch.equal, call.run(algorithm, instructions), expected)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
