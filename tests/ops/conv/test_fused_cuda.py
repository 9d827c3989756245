"""Every fused convolution on a device: values against float64, memory around the results, streams and graphs."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastprune.ops.conv import fused, triton_conv
from fastprune.ops.conv.agreement import measure
from fastprune.ops.conv.autotune import Autotuner
from fastprune.ops.conv.fused import Channels, FusedGeometry, Kernel
from fastprune.ops.conv.trial import Trials

pytestmark = pytest.mark.gpu

KERNELS = fused.kernels_of_this_build()
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.dtype} {kernel.name}")
GUARD = 77.0


@dataclass(frozen=True)
class Case:
    x: Tensor
    weight: Tensor
    channels: Channels
    geometry: FusedGeometry
    results: list[Tensor]
    around: list[Tensor]  # the wider tensors whose first channels the results are

    def run(self, kernel: Kernel) -> None:
        kernel.run(self.x, self.weight, self.channels, self.geometry, self.results)

    def exact(self) -> list[Tensor]:
        return list(fused.library_conv(self.x.double(), self.weight.double(), self.channels, self.geometry))

    def check(self) -> None:
        """Allow twice the error of plain torch in the same dtype, plus one rounding of the largest number."""
        plain = fused.library_conv(self.x, self.weight, self.channels, self.geometry)
        for got, usual, exact in zip(self.results, plain, self.exact(), strict=True):
            allowed = measure(usual.double() - exact) * 2.0 + measure(exact) * fused.UNITS[self.x.dtype]
            error = measure(got.double() - exact)
            assert error.largest <= allowed.largest, f"error {error}, allowed {allowed}, case {self.describe()}"
            assert error.mean <= allowed.mean, f"error {error}, allowed {allowed}, case {self.describe()}"
        for wide, got in zip(self.around, self.results, strict=True):
            assert (wide[1:-1, got.shape[1] :] == GUARD).all(), f"channels behind the result, case {self.describe()}"
            assert (wide[[0, -1]] == GUARD).all(), f"images around the result, case {self.describe()}"

    def describe(self) -> str:
        return f"{tuple(self.x.shape)} {tuple(self.weight.shape)} {self.x.stride()} {self.geometry}"


def prefix(channels: int, wide: int, shape: tuple[int, int, int], dtype: torch.dtype, scale: float) -> Tensor:
    """Return the first channels of a wider channels_last tensor with NaN behind them, which a kernel must not read."""
    n, h, w = shape
    whole = torch.full((n, wide, h, w), torch.nan, dtype=dtype, device="cuda")
    whole = whole.contiguous(memory_format=torch.channels_last)
    whole[:, :channels] = torch.randn(n, channels, h, w, device="cuda") * scale
    return whole[:, :channels]


def make_case(kernel: Kernel, choose: random.Random) -> Case:
    """Draw sizes on all sides of the tiles, often such as the kernel needs."""
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[kernel.dtype]
    product = "1x1" in kernel.name
    step = 1 if "c1" in kernel.name else 2 if "c2" in kernel.name else 8
    c = step * choose.randint(1, 160 // step)
    k = (1 if "k1" in kernel.name else 8) * choose.randint(1, 300 if "k1" in kernel.name else 40)
    n, h, w = choose.randint(1, 5), choose.randint(1, 33), choose.randint(1, 33)
    window = (1, 1) if product else choose.choice([(1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 4)])
    geometry = FusedGeometry(
        stride=(1, 1) if product else (choose.randint(1, 3), choose.randint(1, 3)),
        padding=(0, 0) if product else (choose.randint(0, 3), choose.randint(0, 3)),
        dilation=(1, 1) if product else (choose.randint(1, 2), choose.randint(1, 2)),
        activation=choose.choice(list(fused.ACTIVATIONS)),
        save="sm80" in kernel.name and choose.random() < 0.5,
    )
    h = max(h, geometry.dilation[0] * (window[0] - 1) + 1)
    w = max(w, geometry.dilation[1] * (window[1] - 1) + 1)
    more = step * choose.randint(0, 8)
    x = prefix(c, c + more, (n, h, w), dtype, 1.0)
    weight = prefix(c, c + more, (k, *window), dtype, (c * window[0] * window[1]) ** -0.5)
    vectors = [torch.randn(k, device="cuda") for _ in range(3)]
    channels = tuple(None if choose.random() < 0.2 else vector for vector in vectors)
    around = []
    for _ in range(1 + geometry.save):
        _, _, p, q = geometry.output_size(x.shape, weight.shape)
        wide = torch.full((n + 2, k + 8 * choose.randint(0, 2), p, q), GUARD, dtype=dtype, device="cuda")
        around.append(wide.contiguous(memory_format=torch.channels_last))
        around[-1][1:-1, :k] = torch.nan
    return Case(x, weight, channels, geometry, [wide[1:-1, :k] for wide in around], around)


def usable(kernel: Kernel, case: Case) -> Kernel | None:
    major, minor = torch.cuda.get_device_capability()
    found = fused.find_supported(case.x, case.weight, case.results, case.geometry, 10 * major + minor)
    return found.get(kernel.name)


def cases(kernel: Kernel, count: int, seed: int) -> Iterator[tuple[Kernel, Case]]:
    major, minor = torch.cuda.get_device_capability()
    first, last = kernel.capabilities
    if not first <= 10 * major + minor <= last:
        pytest.skip("no code for this device")
    choose = random.Random(seed)
    torch.manual_seed(seed)
    made = 0
    for _ in range(20 * count):
        case = make_case(kernel, choose)
        if (ready := usable(kernel, case)) is not None:
            yield ready, case
            made += 1
            if made == count:
                return
    pytest.fail(f"only {made} of {20 * count} cases are supported")


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@EACH_KERNEL
@pytest.mark.parametrize("seed", range(3), ids="seed{}".format)
def test_values_of_every_kernel(kernel, seed):
    for ready, case in cases(kernel, 4, seed):
        case.run(ready)
        case.check()


@EACH_KERNEL
def test_many_tiles_and_a_long_reduction(kernel):
    """Compute more tiles than the device holds at once, in more steps than the pipeline has stages."""
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[kernel.dtype]
    window = (1, 1) if "1x1" in kernel.name else (3, 3)
    geometry = FusedGeometry(padding=(0, 0) if window == (1, 1) else (1, 1), activation="relu")
    x = prefix(512, 512, (16, 40, 40), dtype, 1.0)
    weight = prefix(512, 512, (520, *window), dtype, (512 * window[0] * window[1]) ** -0.5)
    wide = torch.full((18, 520, 40, 40), GUARD, dtype=dtype, device="cuda").contiguous(
        memory_format=torch.channels_last
    )
    vectors = tuple(torch.randn(520, device="cuda") for _ in range(3))
    case = Case(x, weight, vectors, geometry, [wide[1:-1]], [wide])
    if (ready := usable(kernel, case)) is None:
        pytest.skip("no code for this device")
    case.run(ready)
    case.check()


@EACH_KERNEL
def test_same_bits_on_every_run(kernel):
    for ready, case in cases(kernel, 2, seed=11):
        case.run(ready)
        first = [result.clone() for result in case.results]
        for _ in range(3):
            for result in case.results:
                result.fill_(torch.nan)
            case.run(ready)
            assert all(torch.equal(a, b) for a, b in zip(first, case.results, strict=True))


@EACH_KERNEL
def test_special_values_go_through(kernel):
    """NaN and infinities behind the convolution stay; a closed channel of finite numbers is zero."""
    for ready, case in cases(kernel, 1, seed=12):
        filters = case.weight.shape[0]
        shift = torch.zeros(filters, device="cuda")
        shift[0] = torch.nan
        for activation in fused.ACTIVATIONS:
            geometry = FusedGeometry(
                case.geometry.stride, case.geometry.padding, case.geometry.dilation, activation=activation
            )
            result = [case.results[0]]
            ready.run(case.x, case.weight, (None, shift, None), geometry, result)
            assert result[0][:, 0].isnan().all()
            assert result[0][:, 1:].isfinite().all()
            ready.run(case.x, case.weight, (None, None, torch.zeros(filters, device="cuda")), geometry, result)
            assert (result[0] == 0).all()


@EACH_KERNEL
def test_one_launch_without_synchronisation(kernel, no_synchronisation):
    for ready, case in cases(kernel, 1, seed=13):
        case.run(ready)
        torch.cuda.synchronize()
        with no_synchronisation():
            case.run(ready)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            case.run(ready)
            torch.cuda.synchronize()
        launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert len(launched) == 1


@EACH_KERNEL
def test_graph_capture(kernel):
    for ready, case in cases(kernel, 1, seed=14):
        case.run(ready)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            case.run(ready)
        case.x.normal_()
        for result in case.results:
            result.fill_(torch.nan)
        graph.replay()
        case.check()


@EACH_KERNEL
def test_runs_on_the_current_stream(kernel):
    for ready, case in cases(kernel, 1, seed=15):
        values = case.x.clone()
        case.x.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            case.x.copy_(values)  # only work that is ordered behind it sees this
            case.run(ready)
        stream.synchronize()
        case.check()


@pytest.fixture
def tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Autotuner:
    tuner = Autotuner(tmp_path)
    monkeypatch.setattr(fused, "AUTOTUNER", tuner)
    return tuner


LAYERS = [  # channels, filters, window, stride, pixels
    (64, 64, 3, 1, 56),
    (256, 64, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (512, 2048, 1, 1, 7),
    (57, 43, 3, 1, 14),
    (3, 64, 7, 2, 112),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_tuner_trusts_every_kernel(tuner, layer, dtype):
    """The tuner would warn of a kernel that differs."""
    channels, filters, window, stride, pixels = layer
    x = torch.randn(8, channels, pixels, pixels, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(filters, channels, window, window, device="cuda", dtype=dtype) / (channels * window**2) ** 0.5
    weight = weight.contiguous(memory_format=torch.channels_last)
    vectors = tuple(torch.rand(filters, device="cuda") for _ in range(3))
    geometry = FusedGeometry((stride, stride), (window // 2, window // 2), activation="relu")
    fallback = partial(fused.library_conv, geometry=geometry)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        (y,) = fused.fused_conv(x, weight, vectors, geometry, fallback)
    (usual,) = fused.library_conv(x, weight, vectors, geometry)
    (exact,) = fused.library_conv(x.double(), weight.double(), vectors, geometry)
    allowed = measure(usual.double() - exact) * 2.0 + measure(exact) * fused.UNITS[dtype]
    assert measure(y.double() - exact).largest <= allowed.largest
    (again,) = fused.fused_conv(x, weight, vectors, geometry, fallback)
    assert torch.equal(y, again)


def test_nothing_is_tuned_while_a_graph_is_captured(tuner):
    x = torch.randn(2, 64, 14, 14, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 1, 1, device="cuda", dtype=torch.float16)
    geometry, nothing = FusedGeometry(activation="relu"), (None, None, None)
    fallback = partial(fused.library_conv, geometry=geometry)
    fused.library_conv(x, weight, nothing, geometry)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = fused.fused_conv(x, weight, nothing, geometry, fallback)
    graph.replay()
    assert torch.equal(y, fused.library_conv(x, weight, nothing, geometry)[0])
    assert not list(tuner.folder.iterdir())
    fused.fused_conv(x, weight, nothing, geometry, fallback)
    assert len(list(tuner.folder.iterdir())) == (bool(KERNELS) or triton_conv.is_here())


def test_float32_needs_permission():
    torch.backends.cudnn.allow_tf32 = False
    assert "allow_tf32 is off" in str(fused.why_not_now(torch.ones(1, device="cuda"))) or not KERNELS


def test_tensors_on_the_cpu_are_refused():
    if not KERNELS:
        pytest.skip("a build without CUTLASS")
    x = torch.randn(2, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    single = next(kernel for kernel in KERNELS if kernel.dtype == "float32")
    with pytest.raises(ValueError, match="x: got a tensor on the CPU, needs one on CUDA"):
        single.run(x, torch.randn(64, 64, 1, 1), (None, None, None), FusedGeometry(), [torch.empty_like(x)])


def test_kernels_are_tried_in_another_process(tuner, tmp_path):
    tuner.trials = Trials("fastprune.ops.conv.problems:problem_of")
    x = torch.randn(8, 64, 28, 28, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    geometry = FusedGeometry(padding=(1, 1), activation="relu", save=True)

    def fallback(*_: object) -> None:
        raise AssertionError("the other process has its own")

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        fused.choose(x, weight, (None, torch.zeros(64, device="cuda"), None), geometry, fallback)
    tuner.trials.close()
    (record,) = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")]
    assert record["dropped"] == {}
    assert len(record["milliseconds"]) > 1
