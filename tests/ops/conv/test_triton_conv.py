"""The Triton kernel, in Triton's interpreter and on GPUs, against float64 and the library's own errors."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastprune.ops.activations import DIFFERENTIABLE_BY_VALUE
from fastprune.ops.conv import fused, library
from fastprune.ops.conv.agreement import measure
from fastprune.ops.conv.fused import ACTIVATIONS, UNITS, FusedGeometry
from fastprune.ops.conv.triton_conv import DEPTHWISE, HALF, TF32, BackwardEpilogue, TritonKernel, is_here, pitch_of
from fastprune.ops.masked_act import masked_act_backward

pytestmark = pytest.mark.skipif(not is_here(), reason="needs Triton")

SMALL = TritonKernel(16, 32, 16, warps=4, stages=2)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make new tensors on a device; on the CPU Triton's interpreter runs the kernel."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    with torch.device(request.param):
        yield request.param


LOOSE = {"cpu": {"rtol": 1e-5, "atol": 1e-5}, "cuda": {"rtol": 1e-2, "atol": 2e-2}}  # tf32


def choice(device: str, dtype: torch.dtype, number: int) -> TritonKernel:
    """Return the kernel to try: the choices take turns on a GPU, as each is compiled anew; small blocks elsewhere."""
    if device == "cpu":
        return SMALL
    kernels = TF32 if dtype == torch.float32 else HALF
    return kernels[number % len(kernels)]


def prefix(channels: int, wide: int, size: tuple[int, int, int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return the first channels of a wider channels_last tensor with NaN behind them, which no kernel may read."""
    n, h, w = size
    whole = torch.full((n, wide, h, w), torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
    whole[:, :channels] = torch.randn(n, channels, h, w) * scale
    return whole[:, :channels]


def empty(size: list[int], dtype: torch.dtype) -> Tensor:
    return torch.full(size, torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)


def filters(k: int, window: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight of a depthwise convolution."""
    return torch.randn(k, 1, *window).to(dtype).contiguous(memory_format=torch.channels_last)


def check(results: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Allow twice the error of plain torch in the same dtype, plus one rounding of the largest number."""
    for got, usual, right in zip(results, plain, exact, strict=True):
        unit = 2.0**-23 if got.dtype == torch.float32 and not got.is_cuda else UNITS[got.dtype]
        allowed = measure(usual.double() - right) * 2.0 + measure(right) * unit
        error = measure(got.double() - right)
        assert error.largest <= allowed.largest, f"error {error}, allowed {allowed}"
        assert error.mean <= allowed.mean, f"error {error}, allowed {allowed}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_forward(activation: str, dtype: torch.dtype, device: str) -> None:
    choose = random.Random(activation)
    torch.manual_seed(0)
    for window in ((1, 1), (3, 3), (2, 1)):
        c, k, size = choose.randint(1, 40), choose.randint(1, 70), (2, choose.randint(4, 9), choose.randint(4, 9))
        x, weight = prefix(c, c + 3, size, dtype), prefix(c, c + 2, (k, *window), dtype, c**-0.5)
        geometry = FusedGeometry(
            stride=(choose.randint(1, 2), choose.randint(1, 2)),
            padding=(choose.randint(0, 2), choose.randint(0, 2)),
            dilation=(choose.randint(1, 2), 1),
            activation=activation,
            save=choose.random() < 0.5,
        )
        channels = tuple(torch.rand(k) - 0.3 if choose.random() < 0.7 else None for _ in range(3))
        shape = geometry.output_size(x.shape, weight.shape)
        residual = prefix(k, k + 5, (shape[0], *shape[2:]), dtype) if choose.random() < 0.5 else None
        plain = fused.library_conv(x, weight, channels, geometry, residual)
        wide = None if residual is None else residual.double()
        exact = fused.library_conv(x.double(), weight.double(), channels, geometry, wide)
        results = [empty(shape, dtype) for _ in range(2 if geometry.save else 1)]
        choice(device, dtype, choose.randrange(99)).run(x, weight, channels, geometry, results, residual)
        check(results, list(plain), list(exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", DIFFERENTIABLE_BY_VALUE)
def test_backward(activation: str, dtype: torch.dtype, device: str) -> None:
    choose = random.Random(activation)
    torch.manual_seed(0)
    for window in ((1, 1), (3, 3), (1, 3)):
        c, k, size = choose.randint(1, 70), choose.randint(2, 40), (2, choose.randint(4, 9), choose.randint(4, 9))
        geometry = FusedGeometry(
            padding=(choose.randint(0, 1), choose.randint(0, 1)), dilation=(1, choose.randint(1, 2))
        )
        weight = prefix(c, c, (k, *window), dtype, k**-0.5)
        previous = ACTIVATIONS[activation](3 * prefix(c, c + 3, size, dtype))
        shape = geometry.output_size(previous.shape, weight.shape)
        opened = choose.randint(1, k)
        dz = prefix(opened, k, (shape[0], *shape[2:]), dtype)
        mask = (torch.rand(c) * 1.5 - 0.25).clamp(0, 1) if choose.random() < 0.8 else None
        others = prefix(c, c + 1, size, dtype) if choose.random() < 0.5 else None
        epilogue = BackwardEpilogue(previous, mask, others, activation)
        plain = two_passes(dz, weight, geometry, epilogue)
        wide = BackwardEpilogue(previous.double(), mask, None if others is None else others.double(), activation)
        exact = two_passes(dz.double(), weight.double(), geometry, wide)
        results = [empty(list(previous.shape), dtype), torch.full((c,), torch.nan)]
        choice(device, dtype, choose.randrange(99)).run_backward(dz, weight, geometry, epilogue, results)
        check(results, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)])
def test_depthwise(stride: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    choose = random.Random(stride[1])
    torch.manual_seed(0)
    for window in ((3, 3), (5, 5), (2, 1)):
        c, size = choose.randint(2, 70), (2, choose.randint(4, 9), choose.randint(4, 9))
        padding, dilation = (choose.randint(0, 2), window[1] // 2), (1, choose.randint(1, 2))
        padding = tuple(max(p, 2) for p in padding) if dilation[1] == 2 else padding
        geometry = FusedGeometry(stride, padding, dilation, groups=c, activation="relu6", save=True)
        weight, mask = filters(c, window, dtype), (torch.rand(c) * 1.5 - 0.25).clamp(0, 1)
        previous = ACTIVATIONS["relu6"](5 * prefix(c, c + 3, size, dtype))
        channels = None, torch.rand(c), mask
        shape = geometry.output_size(previous.shape, weight.shape)
        plain = fused.library_conv(previous, weight, channels, geometry)
        exact = fused.library_conv(previous.double(), weight.double(), channels, geometry)
        dz, others = prefix(c, c + 5, (shape[0], *shape[2:]), dtype), prefix(c, c + 1, size, dtype)
        epilogue = BackwardEpilogue(previous, mask, others, "relu6")
        wide = BackwardEpilogue(previous.double(), mask, others.double(), "relu6")
        kernel = TritonKernel(16, 32, 0, 4, 1) if device == "cpu" else choose.choice(DEPTHWISE)
        results = [empty(shape, dtype) for _ in range(2)]
        kernel.run(previous, weight, channels, geometry, results)
        check(results, list(plain), list(exact))
        results = [empty(list(previous.shape), dtype), torch.full((c,), torch.nan)]
        kernel.run_backward(dz, weight, geometry, epilogue, results)
        usual = two_passes(dz, weight, geometry, epilogue)
        check(results, usual, two_passes(dz.double(), weight.double(), geometry, wide))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [*HALF, *TF32, *DEPTHWISE], ids=lambda kernel: kernel.name)
def test_every_choice(kernel: TritonKernel) -> None:
    """Many blocks, and sizes that are no multiples of them."""
    dtype = torch.float32 if kernel in TF32 else torch.bfloat16
    depthwise = kernel in DEPTHWISE
    with torch.device("cuda"):
        c = k = 200
        geometry = FusedGeometry(padding=(1, 1), groups=c if depthwise else 1, activation="relu", save=True)
        weight = filters(k, (3, 3), dtype) if depthwise else prefix(c, c, (k, 3, 3), dtype, c**-0.5 / 3)
        previous = prefix(c, c + 8, (4, 29, 31), dtype).relu()
        channels = torch.rand(k), torch.rand(k), torch.rand(k)
        results = [empty([4, k, 29, 31], dtype) for _ in range(2)]
        kernel.run(previous, weight, channels, geometry, results)
        plain = fused.library_conv(previous, weight, channels, geometry)
        check(results, list(plain), list(fused.library_conv(previous.double(), weight.double(), channels, geometry)))
        dz, mask = prefix(k, k, (4, 29, 31), dtype), torch.rand(c)
        results = [empty([4, c, 29, 31], dtype), torch.full((c,), torch.nan)]
        kernel.run_backward(dz, weight, geometry, BackwardEpilogue(previous, mask, None, "relu"), results)
        usual = two_passes(dz, weight, geometry, BackwardEpilogue(previous, mask, None, "relu"))
        wide = BackwardEpilogue(previous.double(), mask, None, "relu")
        check(results, usual, two_passes(dz.double(), weight.double(), geometry, wide))


def two_passes(dz: Tensor, weight: Tensor, geometry: FusedGeometry, epilogue: BackwardEpilogue) -> list[Tensor]:
    """Compute the gradients by the library's convolution and one pass behind it."""
    previous = epilogue.previous
    assert previous is not None
    acc = library.input_gradient(dz, list(previous.shape), weight[: dz.shape[1]], geometry)
    mask = None if epilogue.mask is None else epilogue.mask.to(torch.promote_types(dz.dtype, torch.float32))
    dx, dmask, _, _ = masked_act_backward(
        acc, previous, mask, others=epilogue.others, activation=epilogue.activation, want_dx=True, want_dmask=True
    )
    assert dx is not None
    assert dmask is not None
    return [dx, dmask]


def test_a_gradient_without_an_activation(device: str) -> None:
    dz, weight = prefix(8, 8, (2, 5, 5), torch.float32), prefix(6, 6, (8, 3, 3), torch.float32)
    geometry, others = FusedGeometry(padding=(1, 1)), prefix(6, 6, (2, 5, 5), torch.float32)
    dx = empty([2, 6, 5, 5], torch.float32)
    choice(device, torch.float32, 0).run_backward(dz, weight, geometry, BackwardEpilogue(others=others), [dx])
    expected = library.input_gradient(dz, [2, 6, 5, 5], weight, geometry) + others
    torch.testing.assert_close(dx, expected, **LOOSE[device])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, of products with infinity
def test_special_values_go_through(device: str) -> None:
    x = torch.tensor([-torch.inf, -1.0, 0.0, 2.0, torch.inf, torch.nan]).view(1, 1, 1, 6)
    weight = torch.ones(1, 1, 1, 1)
    for activation in ACTIVATIONS:
        geometry = FusedGeometry(activation=activation)
        y = torch.zeros(1, 1, 1, 6)
        choice(device, torch.float32, 0).run(x, weight, (None, None, None), geometry, [y])
        torch.testing.assert_close(y, ACTIVATIONS[activation](x), equal_nan=True, **LOOSE[device])


def test_the_pitch_of_thin_tensors() -> None:
    wide = torch.zeros(3, 10, 4, 5).contiguous(memory_format=torch.channels_last)
    assert pitch_of(wide[:, :4]) == 10
    assert pitch_of(wide[:, :4, :, :1]) == 50
    assert pitch_of(wide[:, :4, :1, :1]) == 200
    assert pitch_of(wide[:1, :4, :1, :1]) == 4
