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
from fastprune.ops import packed_conv
from fastprune.ops.convolution import Geometry
from fastprune.ops.frozen_conv import FrozenConv
from fastprune.ops.packed_conv import PackedWeight

INSTRUCTIONS = _C.masked_conv_instructions()

pytestmark = pytest.mark.skipif(not INSTRUCTIONS, reason="the kernels are not written for this processor")


def pixels(*size: int) -> Tensor:
    return torch.randn(size).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Case:
    """Of `channels`, x has `inputs` and the result `rows`."""

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
        return packed_conv.pack(self.weight, self.geometry, instructions=instructions)

    def run(self, instructions: str) -> tuple[Tensor, Tensor]:
        y, saved = packed_conv.convolve(
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
        """At most twice the error of torch's own float32, or a few roundings of what is added up."""
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


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_same_bits_for_every_number_of_threads(stride, instructions, monkeypatch):
    case = Case.of(4, 200, 200, 200, (33, 40), (3, 3), (stride, stride), (1, 1), (1, 1))
    first = case.run(instructions)
    case.check(first)
    for threads in (2, 3, 8, 100):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert all(map(torch.equal, first, case.run(instructions)))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(0, 69), st.tuples(st.integers(3, 20), st.integers(3, 20)), st.integers(0, 2**31))
def test_the_backward_epilogue(instructions, channels, closed, size, seed):
    torch.manual_seed(seed)
    weight, geometry = torch.randn(channels, 1, 3, 3), Geometry(padding=(1, 1), groups=channels)
    previous, residual, mask = F.relu(pixels(2, channels, *size)), pixels(2, channels, *size), torch.randn(channels)
    dz = pixels(2, channels, *size)[:, : max(1, channels - closed)]
    packed = packed_conv.pack(weight, geometry, transposed=True, instructions=instructions)
    ours = packed_conv.convolve_back(
        dz, packed, residual=residual, previous=previous, mask=mask, activation="relu", want_dmask=True
    )

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = F.pad(dz, (0, 0, 0, 0, 0, channels - dz.shape[1])).to(dtype)
        d = F.conv_transpose2d(wide, weight.to(dtype), padding=1, groups=channels) + residual.to(dtype)
        products = d * previous.to(dtype)
        added_up.append(products.abs().sum((0, 2, 3)).max().item())
        return d * mask.to(dtype).view(-1, 1, 1) * (previous > 0), products.sum((0, 2, 3))

    added_up: list[float] = []
    both, terms = (expected(torch.float32), expected(torch.float64)), 10 * residual.abs().max().item()
    for result, plain, exact, floor in zip(ours, *both, (terms, added_up[1]), strict=True):
        error, worst = ((tensor.double() - exact).abs().max().item() for tensor in (result, plain))
        assert error <= max(2.0**-23 * floor, 2 * worst)


def test_what_is_not_finite_reaches_its_own_channel_alone():
    case = Case.of(1, 40, 40, 40, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1))
    case.x[0, 7, 4, 4] = torch.nan
    y, _ = case.run(INSTRUCTIONS[0])
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 3:6] = True
    assert torch.equal(y[0, 7].isnan(), expected)
    assert not y[0, [*range(7), *range(8, 40)]].isnan().any()


def test_where_it_is_used(monkeypatch):
    """By FrozenConv, for kernels of up to 128 taps and as many outputs as inputs."""
    used = []
    convolve = packed_conv.convolve
    monkeypatch.setattr(packed_conv, "convolve", lambda *a, **k: used.append(a[1].algorithm) or convolve(*a, **k))
    for size, outputs, expected in ((3, 24, ["depthwise"]), (11, 24, ["depthwise"]), (13, 24, []), (3, 48, [])):
        x = pixels(1, 24, 16, 16).requires_grad_()
        FrozenConv(torch.randn(outputs, 1, size, size), padding=size // 2, groups=24)(x)
        assert used == expected
        used.clear()
