"""The fused convolutions without a GPU: the library's result, and which kernels may replace it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from fastprune import _C
from fastprune.ops.conv import fused
from fastprune.ops.conv.autotune import Autotuner
from fastprune.ops.conv.fused import Channels, FusedGeometry, Kernel

needs_kernels = pytest.mark.skipif(not _C.fused_conv_candidates(), reason="a build without CUTLASS")

NONE: Channels = (None, None, None)


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(dtype).contiguous(memory_format=torch.channels_last)


def vectors(channels: int) -> Channels:
    random = torch.Generator().manual_seed(1)
    scale, shift, mask = torch.randn(3, channels, generator=random)
    return scale, shift, mask.clamp(0, 1)


@pytest.mark.parametrize("activation", list(fused.ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_library_follows_the_formula(activation, dtype):
    x, weight, (scale, shift, mask) = image(2, 8, 7, 5, dtype=dtype), image(6, 8, 3, 3, dtype=dtype), vectors(6)
    geometry = FusedGeometry((2, 1), (1, 0), (1, 2), activation=activation, save=True)
    y, saved = fused.library_conv(x, weight, (scale, shift, mask), geometry)
    assert y.dtype == saved.dtype == dtype
    z = torch.nn.functional.conv2d(x.double(), weight.double(), None, (2, 1), (1, 0), (1, 2))
    z = z * scale.double()[:, None, None] + shift.double()[:, None, None]
    r = {
        "identity": z,
        "relu": z.clamp(min=0),
        "relu6": z.clamp(0, 6),
        "silu": z / (1 + (-z).exp()),
        "hardswish": z * (z + 3).clamp(0, 6) / 6,
    }[activation]
    step = torch.finfo(dtype).eps
    bound = 4 * step * z.abs().max() if dtype != torch.float64 else 1e-13 * z.abs().max()
    assert (y.double() - r * mask.double()[:, None, None]).abs().max() <= bound
    assert (saved.double() - (z if activation in ("silu", "hardswish") else r)).abs().max() <= bound
    assert list(y.shape) == geometry.output_size(x.shape, weight.shape)


def test_without_vectors_it_is_a_plain_convolution():
    x, weight = image(2, 6, 7, 5), image(4, 3, 3, 3)
    (y,) = fused.library_conv(x, weight, NONE, FusedGeometry(padding=(1, 1), groups=2))
    assert torch.equal(y, torch.nn.functional.conv2d(x, weight, padding=1, groups=2))


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (image(2, 8, 4, 5), True),
        (image(2, 8, 4, 5)[:, :3], True),
        (image(2, 8, 4, 5)[:, 3:5], True),
        (image(4, 8, 4, 5)[1:3], True),
        (torch.ones(2, 8, 1, 1), True),
        (image(2, 8, 1, 1)[:, :4], True),
        (torch.ones(2, 1, 4, 5), True),
        (torch.ones(1, 8, 1, 1), True),
        (image(0, 8, 4, 5), True),
        (torch.ones(2, 8, 4, 5), False),
        (image(2, 8, 4, 5)[:, ::2], False),
        (image(2, 8, 4, 5)[:, :, ::2], False),
        (image(2, 8, 4, 5)[:, :, :, :3], False),
        (image(4, 8, 4, 5)[::2], False),
        (image(2, 8, 4, 5).flip(1).transpose(2, 3), False),
        (torch.ones(1, 1, 1, 1).expand(2, 8, 4, 5), False),
    ],
)
def test_which_tensors_are_channels_last(tensor, expected):
    assert fused.has_rows(tensor) == expected


def test_inputs_for_trials_resemble_the_real_ones():
    state = torch.get_rng_state()
    x, weight = image(2, 64, 9, 7, dtype=torch.bfloat16)[:, :48], image(40, 64, 3, 3, dtype=torch.bfloat16)[:, :48]
    scale, _, mask = vectors(40)
    inputs = fused._draw_similar(x, weight, (scale, None, mask))
    assert torch.equal(torch.get_rng_state(), state)  # the user's random numbers are left alone
    for given, made in ((x, inputs.x), (weight, inputs.weight)):
        assert (made.shape, made.stride(), made.dtype) == (given.shape, given.stride(), given.dtype)
    assert inputs.channels[1] is None
    made_mask = inputs.channels[2]
    assert made_mask is not None
    assert (made_mask == 0).any()
    assert (made_mask == 1).any()
    assert made_mask.min() >= 0
    z = fused._compute_exactly(inputs, FusedGeometry(padding=(1, 1)))[0]
    assert 0.3 < z.std() < 3  # nothing overflows, nothing vanishes
    again = fused._draw_similar(x, weight, (scale, None, mask))
    assert torch.equal(inputs.x, again.x)


def test_another_process_gets_the_same_problem(monkeypatch):
    x, weight = image(2, 64, 9, 7, dtype=torch.bfloat16)[:, :48], image(40, 64, 3, 3, dtype=torch.bfloat16)[:, :48]
    scale, shift, _ = vectors(40)
    geometry = FusedGeometry((2, 1), (1, 0), (1, 2), activation="silu", save=True)
    residual = image(2, 40, 5, 3, dtype=torch.bfloat16)
    assert list(residual.shape) == geometry.output_size(x.shape, weight.shape)
    key = json.loads(json.dumps(fused._make_key(x, weight, (scale, shift, None), geometry, residual)))
    kernels = {name: Kernel(index, name, "bfloat16", (80, 90)) for index, name in enumerate(("one", "two", "three"))}
    monkeypatch.setattr(fused, "_find_supported_here", lambda *_: kernels)
    problem = fused.problem_of(dict(key), torch.device("cpu"), ["three", "one"])
    assert [candidate.name for candidate in problem.candidates] == ["three", "one"]
    inputs = fused._draw_similar(x, weight, (scale, shift, None), residual)
    expected = fused.two_passes(inputs.x, inputs.weight, inputs.channels, geometry, inputs.residual)
    for got, usual in zip(problem.fallback(), expected, strict=True):
        assert torch.equal(got, usual)
    assert problem.unit == fused.UNITS[torch.bfloat16]


def test_exact_results_do_not_depend_on_how_images_are_split():
    inputs = fused._draw_similar(image(37, 4, 5, 5), image(6, 4, 3, 3), NONE)
    (parts,) = fused._compute_exactly(inputs, FusedGeometry())
    (whole,) = fused.library_conv(inputs.x.double(), inputs.weight.double(), NONE, FusedGeometry())
    torch.testing.assert_close(parts, whole.float(), rtol=1e-6, atol=1e-6)


@dataclass(frozen=True)
class OnTheCPU(Kernel):
    """A substitute for a compiled kernel."""

    offset: float = 0.0

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        channels: Channels,
        geometry: FusedGeometry,
        results: Sequence[Tensor],
        residual: Tensor | None = None,
    ) -> None:
        for result, value in zip(results, fused.library_conv(x, weight, channels, geometry, residual), strict=True):
            result.copy_(value + self.offset)


@pytest.fixture
def two_kernels(monkeypatch):
    """Install a right kernel and a faster wrong one; the library is slowest."""

    def timer(calls, device):
        return [3.0, 2.0, 1.0][: len(calls)]

    kernels = [OnTheCPU(0, "right", "float32", (0, 0)), OnTheCPU(1, "wrong", "float32", (0, 0), offset=0.125)]
    monkeypatch.setattr(fused, "why_not_now", lambda x: None)
    monkeypatch.setattr(fused, "_find_supported_here", lambda *arguments: {kernel.name: kernel for kernel in kernels})
    monkeypatch.setattr(fused, "_SUPPORTED", {})
    tuner = Autotuner(timer=timer)
    monkeypatch.setattr(fused, "AUTOTUNER", tuner)
    return tuner


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_the_chosen_kernel_runs(two_kernels, save, adds):
    x, weight, channels = image(2, 8, 7, 5), image(6, 8, 3, 3), vectors(6)
    residual = image(2, 6, 5, 3) if adds else None
    geometry = FusedGeometry(activation="silu", save=save)
    calls = []

    def fallback(*arguments, residual):
        calls.append(arguments)
        return fused.library_conv(*arguments, geometry, residual)

    with pytest.warns(RuntimeWarning, match="kernel 'wrong' is not used for .*'x': \\(2, 8, 7, 5\\)"):
        results = fused.fused_conv(x, weight, channels, geometry, fallback, residual)
    expected = fused.library_conv(x, weight, channels, geometry, residual)
    assert len(results) == 1 + save
    assert all(torch.equal(got, wanted) for got, wanted in zip(results, expected, strict=True))
    assert len(calls) > 0
    assert all(given[0] is not x for given in calls)  # tried on other numbers than the user's
    calls.clear()
    fused.fused_conv(x, weight, channels, geometry, fallback, residual)
    assert calls == []
    two_kernels.enabled = False
    fused.fused_conv(x, weight, channels, geometry, fallback, residual)
    assert calls[0][0] is x


def test_other_shapes_are_tried_again(two_kernels):
    weight, geometry = image(6, 8, 3, 3), FusedGeometry()
    fallback = partial(fused.library_conv, geometry=geometry)
    for x in (image(2, 8, 7, 5), image(2, 8, 5, 7), image(2, 16, 7, 5)[:, :8]):
        for channels in (NONE, vectors(6)):
            with pytest.warns(RuntimeWarning, match="'wrong' is not used"):
                fused.fused_conv(x, weight, channels, geometry, fallback)
            fused.fused_conv(x, weight, channels, geometry, fallback)  # no warning: known


def results_for(x: Tensor, weight: Tensor, geometry: FusedGeometry) -> list[Tensor]:
    return [fused._make_output(x, weight, geometry) for _ in range(2 if geometry.save else 1)]


def names(x: Tensor, weight: Tensor, geometry: FusedGeometry | None = None, capability: int = 90) -> set[str]:
    """Return CUTLASS's kernels; Triton's take all sizes."""
    geometry = geometry or FusedGeometry()
    found = fused.find_supported(x, weight, results_for(x, weight, geometry), geometry, capability)
    return {name for name, kernel in found.items() if isinstance(kernel, Kernel)}


@pytest.mark.parametrize(
    ("x", "weight", "geometry", "why"),
    [
        (
            image(2, 8, 4, 4),
            image(8, 8, 3, 3).half(),
            FusedGeometry(),
            "the dtypes are torch.float32 and torch.float16",
        ),
        (image(2, 8, 4, 4).double(), image(8, 8, 3, 3).double(), FusedGeometry(), "the dtypes are torch.float64"),
        (image(2, 8, 4, 4), image(8, 4, 3, 3), FusedGeometry(groups=2), "there are 2 groups"),
        (image(2, 8, 4, 4)[0], image(8, 8, 3, 3), FusedGeometry(), "not two-dimensional"),
        (torch.ones(2, 8, 4, 4), image(8, 8, 3, 3), FusedGeometry(), "not channels_last"),
        (image(2, 8, 4, 4), torch.ones(8, 8, 3, 3), FusedGeometry(), "not channels_last"),
        (image(0, 8, 4, 4), image(8, 8, 3, 3), FusedGeometry(), "nothing to compute"),
        (image(2, 8, 4, 4), image(8, 8, 3, 3), FusedGeometry(), None),
    ],
)
def test_which_kernels_may_run_depends_on_the_tensors(x, weight, geometry, why):
    found = fused.why_not_for(x, weight, geometry)
    assert found is None if why is None else why in str(found)
    if why is not None:
        assert fused._find_supported_here(x, weight, geometry) == {}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_layer_of_a_resnet_has_kernels(dtype):
    for channels, filters, window, stride, size in (
        (64, 64, 1, 1, 56),
        (64, 64, 3, 1, 56),
        (64, 256, 1, 1, 56),
        (128, 128, 3, 2, 56),
        (256, 512, 1, 2, 56),
        (512, 512, 3, 1, 7),
        (2048, 512, 1, 1, 7),
    ):
        x, weight = image(2, channels, size, size, dtype=dtype), image(filters, channels, window, window, dtype=dtype)
        geometry = FusedGeometry((stride, stride), (window // 2, window // 2), activation="relu")
        on_80, on_90 = (names(x, weight, geometry, capability) for capability in (80, 90))
        assert len(on_80) >= 6
        assert on_80 == {name for name in on_90 if name.startswith("sm80")} == names(x, weight, geometry, 100)
        newer = on_90 - on_80
        assert all(name.startswith("sm90") for name in newer)
        if dtype != torch.float32:
            product = window == 1 and stride == 1
            assert any("1x1" in name for name in newer) == product
            assert any("1x1" not in name for name in newer)
        assert names(x, weight, geometry, 75) == set()


@needs_kernels
def test_alignment_decides():
    def half(channels: int, filters: int, wide: int = 64) -> set[str]:
        return names(
            image(2, wide, 9, 9, dtype=torch.float16)[:, :channels],
            image(filters, channels, 3, 3, dtype=torch.float16),
        )

    assert any(name.startswith("sm90") for name in half(48, 40))
    assert all(name.endswith("k1") for name in half(48, 39))
    assert half(46, 40) == {"sm80 128x64x32 s3 c2 k1"}
    assert half(45, 40) == half(3, 8, 3) == set()  # the library computes the first layer
    assert half(48, 40, 63) == set()
    assert all(name.endswith("c2 k1") for name in half(48, 40, 62))
    single = names(image(2, 3, 9, 9), image(5, 3, 3, 3))
    assert single == {"sm80 128x64x16 s4 c1 k1"}
    base = torch.zeros(2 * 9 * 9 * 16 + 8, dtype=torch.float16)
    shifted = base[4:-4].view(2, 9, 9, 16).permute(0, 3, 1, 2)
    assert names(shifted, image(8, 16, 1, 1, dtype=torch.float16)) == {"sm80 128x64x32 s3 c2 k1"}


@needs_kernels
def test_only_kernels_with_two_results_save():
    x, weight = image(2, 64, 9, 9, dtype=torch.bfloat16), image(64, 64, 1, 1, dtype=torch.bfloat16)
    saving = names(x, weight, FusedGeometry(save=True))
    assert saving
    assert all(name.startswith("sm80") for name in saving)


@needs_kernels
def test_windows_and_steps_at_their_limits():
    x = image(1, 8, 80, 80, dtype=torch.float16)
    wide = names(x, image(8, 8, 33, 1, dtype=torch.float16))
    assert all(name.startswith("sm90") for name in wide)  # sm80 keeps a bit for each row of the window in 32
    assert not any(
        name.startswith("sm90") for name in names(x, image(8, 8, 3, 3, dtype=torch.float16), FusedGeometry((9, 9)))
    )
    dilated = FusedGeometry(dilation=(20, 20), padding=(20, 20))
    assert names(x, image(8, 8, 3, 3, dtype=torch.float16), dilated)


def test_candidates_have_different_names():
    listed = [(entry["dtype"], entry["name"]) for entry in _C.fused_conv_candidates()]
    assert len(set(listed)) == len(listed)
    assert (_C.build_info()["cutlass"] is None) == (listed == [])
