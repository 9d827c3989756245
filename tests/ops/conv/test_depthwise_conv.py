"""Depthwise convolutions on the CPU: values, gradients, bits, prefixes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastprune import _C
from fastprune.ops.conv import packed as masked_conv
from fastprune.ops.conv.frozen import FrozenConv
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.packed import PackedWeight

INSTRUCTIONS = _C.masked_conv_instructions()

pytestmark = pytest.mark.skipif(not INSTRUCTIONS, reason="the kernels are not written for this processor")


def pixels(*size: int) -> Tensor:
    return torch.randn(size).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Case:
    """A convolution of `channels`, of which x has `inputs` and the result `rows`."""

    x: Tensor
    weight: Tensor
    geometry: Geometry
    rows: int
    shift: Tensor
    mask: Tensor
    residual: Tensor

    @classmethod
    def of(
        cls, batch: int, channels: int, inputs: int, rows: int, size: tuple[int, int], kernel: tuple[int, int],
        stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    ) -> Case:  # fmt: skip
        spans = [dilation[d] * (kernel[d] - 1) + 1 for d in (0, 1)]
        padding = tuple(min(padding[d], spans[d] - 1) for d in (0, 1))
        size = tuple(max(size[d], spans[d] - 2 * padding[d]) for d in (0, 1))
        x, weight = pixels(batch, channels, *size), torch.randn(channels, 1, *kernel)
        geometry = Geometry(stride, padding, dilation, channels)
        out = geometry.output_size(x.shape, weight.shape)
        return cls(x[:, :inputs], weight, geometry, rows, torch.randn(channels), torch.randn(channels), pixels(*out))

    def pack(self, instructions: str) -> PackedWeight:
        return masked_conv.pack(self.weight, self.geometry, instructions=instructions)

    def run(self, instructions: str) -> tuple[Tensor, Tensor]:
        y, saved = masked_conv.convolve(
            self.x, self.pack(instructions), self.rows, shift=self.shift, mask=self.mask, residual=self.residual,
            activation="relu6", saves=True,
        )  # fmt: skip
        assert saved is not None
        return y, saved

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        channels = self.weight.shape[0]
        x = F.pad(self.x, (0, 0, 0, 0, 0, channels - self.x.shape[1])).to(dtype)
        geometry = self.geometry
        z = F.conv2d(x, self.weight.to(dtype), self.shift.to(dtype), geometry.stride, geometry.padding,
                     geometry.dilation, channels)  # fmt: skip
        r = (z + self.residual.to(dtype)).clamp(0, 6)
        r[:, self.rows :] = 0
        return r * self.mask.to(dtype).view(-1, 1, 1), r

    def check(self, results: tuple[Tensor, Tensor]) -> None:
        """Allow twice the error of torch's own float32, or a few roundings of the sum's terms."""
        terms = self.weight[0].numel() + 2
        largest = max(t.abs().max().item() for t in (self.x, self.weight, self.shift, self.residual, self.mask))
        floor = 2.0**-24 * terms * largest**2
        for ours, plain, exact in zip(results, self.expected(torch.float32), self.expected(torch.float64), strict=True):
            error, worst = ((result.double() - exact).abs().max().item() for result in (ours, plain))
            assert error <= max(floor, 2 * worst)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(0, 69), st.integers(0, 69),
    st.tuples(st.integers(1, 30), st.integers(1, 30)), st.tuples(st.integers(1, 7), st.integers(1, 7)), pairs,
    st.tuples(st.integers(0, 6), st.integers(0, 6)), pairs, st.integers(0, 2**31),
)  # fmt: skip
def test_values(batch, channels, closed, absent, size, kernel, stride, padding, dilation, seed):
    torch.manual_seed(seed)
    rows, inputs = max(1, channels - closed), max(1, channels - absent)
    case = Case.of(batch, channels, inputs, rows, size, kernel, stride, padding, dilation)
    results = [case.run(instructions) for instructions in INSTRUCTIONS]
    case.check(results[0])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


LARGE = {  # batch, channels, inputs, rows, size, stride
    "lines": (4, 200, 200, 200, (33, 40), (1, 1)),
    "strided": (4, 200, 200, 200, (33, 40), (2, 2)),
    "larger than the caches": (8, 80, 80, 80, (64, 64), (1, 1)),  # 10 MiB, written past them
    "larger than the caches, ragged": (8, 80, 80, 69, (64, 64), (1, 1)),  # 9 MiB
}


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("name", LARGE)
def test_same_bits_for_every_number_of_threads(name, instructions, monkeypatch):
    *sizes, stride = LARGE[name]
    case = Case.of(*sizes, (3, 3), stride, (1, 1), (1, 1))
    first = case.run(instructions)
    case.check(first)
    for threads in (2, 3, 8, 100):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert all(map(torch.equal, first, case.run(instructions)))


@dataclass(frozen=True)
class Backward:
    """The backward pass of ``y = conv(mask * relu(…))``; ``dz`` lacks the closed channels."""

    dz: Tensor
    weight: Tensor
    previous: Tensor
    residual: Tensor
    mask: Tensor

    @classmethod
    def of(cls, batch: int, channels: int, closed: int, size: tuple[int, int]) -> Backward:
        previous, residual, dz = (pixels(batch, channels, *size) for _ in range(3))
        weight, mask = torch.randn(channels, 1, 3, 3), torch.randn(channels)
        return cls(dz[:, : max(1, channels - closed)], weight, F.relu(previous), residual, mask)

    def run(self, instructions: str) -> tuple[Tensor, Tensor]:
        geometry = Geometry(padding=(1, 1), groups=self.weight.shape[0])
        packed = masked_conv.pack(self.weight, geometry, transposed=True, instructions=instructions)
        dx, dmask = masked_conv.convolve_back(
            self.dz, packed, residual=self.residual, previous=self.previous, mask=self.mask, activation="relu",
            want_dmask=True,
        )  # fmt: skip
        assert dmask is not None
        return dx, dmask

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute the gradients by torch's operators."""
        channels = self.weight.shape[0]
        wide = F.pad(self.dz, (0, 0, 0, 0, 0, channels - self.dz.shape[1])).to(dtype)
        d = F.conv_transpose2d(wide, self.weight.to(dtype), padding=1, groups=channels) + self.residual.to(dtype)
        products = d * self.previous.to(dtype)
        dx = d * self.mask.to(dtype).view(-1, 1, 1) * (self.previous > 0)
        return dx, products.sum((0, 2, 3))

    def added_up(self) -> tuple[float, float]:
        """Return the largest sum of absolute values in an element of each gradient."""
        made = (self.dz, self.weight, self.previous, self.residual, self.mask)
        dx, dmask = Backward(*(tensor.abs() for tensor in made)).expected(torch.float64)
        return dx.max().item(), dmask.max().item()

    def check(self, results: tuple[Tensor, Tensor]) -> None:
        """Allow twice the error of torch's own float32, or the error of rounding.

        An element of dx is rounded eleven times: nine products, the residual and the mask. The gradient of a gate sums
        so many roundings that they even out.
        """
        plain, exact = self.expected(torch.float32), self.expected(torch.float64)
        floors = [count * 2.0**-24 * size for count, size in zip((11, 2), self.added_up(), strict=True)]
        for ours, theirs, right, floor in zip(results, plain, exact, floors, strict=True):
            error, worst = ((tensor.double() - right).abs().max().item() for tensor in (ours, theirs))
            assert error <= max(floor, 2 * worst)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(0, 69), st.tuples(st.integers(3, 20), st.integers(3, 20)), st.integers(0, 2**31))
def test_the_backward_epilogue(instructions, channels, closed, size, seed):
    torch.manual_seed(seed)
    case = Backward.of(2, channels, closed, size)
    case.check(case.run(instructions))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(
    ("batch", "channels", "size"),
    [(4, 200, (33, 40)), (8, 80, (64, 64))],  # several tasks for each image; 10 MiB, written past the caches
)
def test_same_gradients_for_every_number_of_threads(batch, channels, size, instructions, monkeypatch):
    torch.manual_seed(0)
    case = Backward.of(batch, channels, 0, size)
    first = case.run(instructions)
    case.check(first)
    for threads in (1, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert all(map(torch.equal, first, case.run(instructions)))


def test_nan_reaches_only_its_own_channel():
    case = Case.of(1, 40, 40, 40, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1))
    case.x[0, 7, 4, 4] = torch.nan
    y, _ = case.run(INSTRUCTIONS[0])
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 3:6] = True
    assert torch.equal(y[0, 7].isnan(), expected)
    assert not y[0, [*range(7), *range(8, 40)]].isnan().any()


def test_where_it_is_used(monkeypatch):
    """FrozenConv uses it for kernels of up to 128 taps and as many outputs as inputs."""
    used = []
    convolve = masked_conv.convolve
    monkeypatch.setattr(masked_conv, "convolve", lambda *a, **k: used.append(a[1].algorithm) or convolve(*a, **k))
    for size, outputs, expected in ((3, 24, ["depthwise"]), (11, 24, ["depthwise"]), (13, 24, []), (3, 48, [])):
        x = pixels(1, 24, 16, 16).requires_grad_()
        FrozenConv(torch.randn(outputs, 1, size, size), padding=size // 2, groups=24)(x)
        assert used == expected
        used.clear()
