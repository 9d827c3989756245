"""channel_moments: mean and variance of every channel."""

import numpy as np
import pytest
import torch

from fastprune import _C
from fastprune.ops.channel_moments import channel_moments

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(2, 3), (70, 4, 1, 1), (3, 5, 7, 7), (2, 300, 20, 20), (5, 1, 9, 9), (2, 3, 40_000), (300, 17, 5, 5)]


def draw(shape, dtype=torch.float32, rows=False, mean=0.0):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) + mean).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if rows and len(shape) > 2 else x


def moments_of(x):
    dims = [0, *range(2, x.dim())]
    return x.double().mean(dims), x.double().var(dims, correction=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_rounded_once(shape, rows, dtype, device):
    x = draw(shape, dtype, rows).to(device)
    for ours, exact in zip(channel_moments(x), moments_of(x), strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 2.0**-23
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * 1e-3)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("mean", [1e3, -1e6])
def test_a_large_mean_costs_the_variance_no_digits(mean, rows):
    x = draw((16, 4, 30, 30), torch.float32, rows, mean)
    _, variance = channel_moments(x)
    torch.testing.assert_close(variance.double(), moments_of(x)[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [False, True])
def test_a_first_value_that_is_an_outlier_does_no_harm(rows):
    x = draw((16, 4, 30, 30), torch.float32, rows)
    x[0, :, 0, 0] = 1e8
    mean, variance = channel_moments(x)
    torch.testing.assert_close(variance.double(), moments_of(x)[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), moments_of(x)[0], rtol=1e-6, atol=0)


def test_a_constant_has_no_variance():
    _, variance = channel_moments(torch.full((4, 3, 5, 5), 0.1))
    assert (variance == 0).all()


@pytest.mark.parametrize("channels", [3, 13, 40, 63])
@pytest.mark.parametrize("pixels", [1, 15, 16, 17, 511, 2050])
def test_views_give_the_bits_of_dense_tensors(channels, pixels):
    """A line joins several short rows, the last one perhaps in part; in a view they lie apart."""
    x = draw((1, channels, pixels, 1), rows=True, mean=0.5)
    whole = torch.full((1, channels + 5, pixels, 1), torch.nan).to(memory_format=torch.channels_last)
    view = whole[:, 2 : 2 + channels]
    view.copy_(x)
    for ours, expected in zip(channel_moments(view), channel_moments(x), strict=True):
        assert torch.equal(ours, expected)
    torch.testing.assert_close(channel_moments(x)[0].double(), moments_of(x)[0], rtol=1e-6, atol=1e-6)


def test_same_bits_for_every_number_of_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 8, 1):
            torch.set_num_threads(threads)
            results.append(torch.stack(channel_moments(draw((8, 40, 57, 31)))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    "shape", [(5, 3), (3, 8, 4, 4), (2, 3, 5, 5), pytest.param((2, 2, 5000), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("threads", [(8, 4), *(pytest.param(t, marks=pytest.mark.slow) for t in ((4, 2), (16, 8)))])
def test_the_device_body(emulated, shape, rows, threads):
    for dtype in (torch.float32, torch.float16):
        x = draw(shape, dtype, rows)
        mean, variance = torch.full((2, shape[1]), torch.nan)
        emulated.channel_moments(x, mean, variance, *threads)
        expected = channel_moments(x)
        torch.testing.assert_close((mean, variance), expected, rtol=2e-7, atol=1e-9)


def test_opcheck():
    torch.library.opcheck(torch.ops.fastprune._channel_moments.default, (draw((2, 3, 4, 5), rows=True),))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros(3, np.float32)}, ValueError, r"x: got shape \[3\], needs \[N, C\]"),
        ({"x": np.zeros((0, 3, 2), np.float32)}, ValueError, "x: got no value, needs at least one"),
        ({"x": np.zeros((2, 3), np.int32)}, TypeError, "x: got dtype int32, needs dtype float32 or float64 or float16"),
        ({"x": np.zeros((4, 3, 2), np.float32)[::-1]}, ValueError, "x: got strides"),
        ({"mean": np.zeros(4, np.float32)}, ValueError, r"mean: got shape \[4\], needs shape \[3\]"),
        ({"mean": np.zeros(3)}, TypeError, "mean: got dtype float64, needs dtype float32"),
        ({"mean": None}, TypeError, "mean: got an object of type NoneType"),
    ],
)
def test_named_refusals(change, error, message):
    arguments = {"x": np.ones((4, 3, 2), np.float32), "mean": np.zeros(3, np.float32), "partials": None}
    arguments["variance"] = np.zeros(3, np.float32)
    with pytest.raises(error, match=message):
        _C.channel_moments(**(arguments | change))


def test_results_share_no_memory():
    x, both = np.ones((4, 3, 2), np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="variance: got memory that overlaps mean"):
        _C.channel_moments(x, both[:3], both[1:], None)
    with pytest.raises(ValueError, match="mean: got memory that overlaps x"):
        _C.channel_moments(x, x[0].reshape(-1)[:3], both[:3], None)
