"""The epilogue of the backward convolution: gradients of mask and activation before the forward one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastprune import _C
from fastprune.ops.activations import BOUNDS
from fastprune.ops.conv import packed as masked_conv
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.packed import PackedWeight
from fastprune.ops.masked_act import masked_act_backward

INSTRUCTIONS = _C.masked_conv_instructions()
KERNELS = [(algorithm, instructions) for instructions in INSTRUCTIONS for algorithm in ("direct", "winograd")]

pytestmark = pytest.mark.skipif(not INSTRUCTIONS, reason="the kernels are not written for this processor")
kernels = pytest.mark.parametrize(("algorithm", "instructions"), KERNELS)


def pixels(*size: int) -> Tensor:
    return torch.randn(size).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Call:
    """The backward pass of y = conv(mask * act(…)): gradients of the mask and of the activation's argument."""

    dz: Tensor
    weight: Tensor
    previous: Tensor
    mask: Tensor | None
    residual: Tensor | None
    activation: str

    @classmethod
    def of(
        cls, batch: int, channels: int, rows: int, size: tuple[int, int], activation: str,
        *, mask: bool = True, residual: bool = True, kernel: int = 3,
    ) -> Call:  # fmt: skip
        previous = F.hardtanh(3 * pixels(batch, channels, *size), *(max(min(b, 1e9), -1e9) for b in BOUNDS[activation]))
        return cls(
            pixels(batch, rows, *size),
            torch.randn(rows, channels, kernel, kernel),
            previous,
            torch.randn(channels) * (torch.rand(channels) < 0.7) if mask else None,
            pixels(*previous.shape) if residual else None,
            activation,
        )

    def pack(self, algorithm: str, instructions: str) -> PackedWeight:
        pad = self.weight.shape[2] // 2
        geometry = Geometry(padding=(pad, pad))
        return masked_conv.pack(self.weight, geometry, transposed=True, algorithm=algorithm, instructions=instructions)

    def run(self, algorithm: str, instructions: str) -> tuple[Tensor, Tensor]:
        dx, dmask = masked_conv.convolve_back(
            self.dz, self.pack(algorithm, instructions), residual=self.residual, previous=self.previous,
            mask=self.mask, activation=self.activation, want_dmask=True,
        )  # fmt: skip
        assert dmask is not None
        return dx, dmask

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute the same by torch's operators."""
        dz, weight, previous = (tensor.to(dtype) for tensor in (self.dz, self.weight, self.previous))
        d = F.conv_transpose2d(dz, weight, padding=self.weight.shape[2] // 2)
        d = d if self.residual is None else d + self.residual.to(dtype)
        lowest, highest = BOUNDS[self.activation]
        inside = (previous > lowest) & (previous < highest)
        mask = torch.ones(1) if self.mask is None else self.mask
        return d * mask.to(dtype).view(-1, 1, 1) * inside, (d * previous).sum((0, 2, 3))

    def magnitudes(self) -> tuple[float, float]:
        """Bound the sums of absolute values in the results, with the taps that Winograd cancels."""
        d = (self.dz.abs().double().amax((0, 2, 3)) @ self.weight.abs().double().sum((2, 3))).max().item()
        d = d if self.residual is None else d + self.residual.abs().max().item()
        largest = 1.0 if self.mask is None else max(1.0, self.mask.abs().max().item())
        return d * largest, d * self.previous.abs().double().sum((0, 2, 3)).max().item()

    def check(self, results: tuple[Tensor, Tensor]) -> None:
        """Allow twice the error of torch's own float32, or a rounding of the sum's terms."""
        floors = self.magnitudes()
        both = self.expected(torch.float32), self.expected(torch.float64)
        for result, plain, exact, floor in zip(results, *both, floors, strict=True):
            error = (result.double() - exact).abs()
            worst = (plain.double() - exact).abs().max()
            assert (error <= max(floor * 2.0**-23, 2 * worst)).all()


@kernels
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.tuples(st.integers(1, 14), st.integers(1, 14)),
    st.sampled_from(sorted(BOUNDS)), st.booleans(), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_values(algorithm, instructions, batch, channels, rows, size, activation, mask, residual, seed):
    torch.manual_seed(seed)
    kernel = 3 if algorithm == "winograd" else 1 + 2 * (seed % 2)
    call = Call.of(batch, channels, rows, size, activation, mask=mask, residual=residual, kernel=kernel)
    call.check(call.run(algorithm, instructions))


LARGE = {
    "pixels in a row": (2, 70, 24, (33, 31), 1),
    "lines": (3, 40, 24, (40, 28), 3),
    "larger than the caches": (8, 96, 16, (56, 56), 1),  # 9 MiB, written past them
    "larger than the caches, in lines": (8, 80, 16, (64, 64), 3),  # 10 MiB
    "few pixels": (1, 300, 64, (7, 7), 3),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_same_bits_for_every_number_of_threads(name, instructions, monkeypatch):
    torch.manual_seed(0)
    *size, space, kernel = LARGE[name]
    call = Call.of(*size, space, "relu", kernel=kernel)
    for algorithm in ("direct", "winograd") if kernel == 3 else ("direct",):
        first = call.run(algorithm, instructions)
        call.check(first)
        for threads in (2, 3, 8):
            monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
            assert all(map(torch.equal, first, call.run(algorithm, instructions)))


@kernels
def test_without_the_masks_gradient(algorithm, instructions):
    call = Call.of(2, 24, 20, (9, 9), "relu6")
    packed = call.pack(algorithm, instructions)
    dx, nothing = masked_conv.convolve_back(
        call.dz, packed, residual=call.residual, previous=call.previous, mask=call.mask, activation="relu6"
    )
    assert nothing is None
    assert torch.equal(dx, call.run(algorithm, instructions)[0])
    plain, _ = masked_conv.convolve_back(call.dz, packed)
    assert torch.equal(plain, masked_conv.convolve(call.dz, packed, 24)[0])


@kernels
@pytest.mark.parametrize("activation", BOUNDS)
def test_derivatives_at_the_bounds_and_at_nan_and_infinity(algorithm, instructions, activation):
    """As in masked_act_backward, NaN is inside of all bounds, and infinity is outside of finite ones only."""
    call = Call.of(1, 16, 16, (8, 8), activation, mask=False, residual=False)
    values = torch.tensor([0.0, -0.0, 6.0, 3.0, math.inf, math.nan])
    call.previous.permute(0, 2, 3, 1).view(-1)[: 6 * 160] = values.repeat(160)
    dx, _ = call.run(algorithm, instructions)
    d = masked_conv.convolve_back(call.dz, call.pack(algorithm, instructions))[0]
    assert torch.equal(dx, masked_act_backward(d, call.previous, activation=activation)[0])


@kernels
def test_without_images(algorithm, instructions):
    call = Call.of(0, 16, 16, (8, 8), "relu", residual=False)
    dx, dmask = call.run(algorithm, instructions)
    assert dx.shape == (0, 16, 8, 8)
    assert torch.equal(dmask, torch.zeros(16))
