"""Gradients of inputs with what follows them: the library's, and which kernels may replace it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastprune.ops.conv import fused, fused_back, problems, triton_conv
from fastprune.ops.conv.autotune import Autotuner
from fastprune.ops.conv.fused_back import BackwardInputs
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.triton_conv import BackwardEpilogue, TritonKernel

CPU = torch.device("cpu")


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def make_inputs(dtype: torch.dtype = torch.float32, *, adds: bool = True, images: int = 2) -> BackwardInputs:
    torch.manual_seed(0)
    previous = image(images, 6, 9, 7, dtype=dtype).relu()
    others = image(images, 6, 9, 7, dtype=dtype) if adds else None
    epilogue = BackwardEpilogue(previous, torch.rand(6), others, "relu")
    dz = image(images, 8, 9, 7, dtype=dtype)[:, :5]
    return BackwardInputs(dz, image(8, 6, 3, 3, dtype=dtype), previous.shape, Geometry(padding=(1, 1)), epilogue, True)


@pytest.mark.parametrize("adds", [False, True])
def test_the_gradients_are_those_of_autograd(adds: bool) -> None:
    inputs = make_inputs(torch.float64, adds=adds)
    epilogue = replace(inputs.epilogue, mask=inputs.epilogue.mask.double())
    z, mask = image(2, 6, 9, 7).double().requires_grad_(), epilogue.mask.clone().requires_grad_()
    r = z.relu()
    y = torch.nn.functional.conv2d(r * mask[:, None, None], inputs.weight[:5], padding=1)
    # Other readers read mask * r, too, where there is a mask.
    loss = (y * inputs.dz).sum() + (0 if epilogue.others is None else (r * mask[:, None, None] * epilogue.others).sum())
    expected = torch.autograd.grad(loss, [z, mask])
    inputs = replace(inputs, epilogue=replace(epilogue, previous=r.detach()))
    torch.testing.assert_close(list(fused_back.two_passes(inputs)), list(expected))


def test_without_an_activation_gradients_are_added() -> None:
    inputs = make_inputs()
    plain = replace(inputs, epilogue=BackwardEpilogue(others=inputs.epilogue.others), want_dmask=False)
    alone = replace(inputs, epilogue=BackwardEpilogue(), want_dmask=False)
    (dx,), (acc,) = fused_back.two_passes(plain), fused_back.two_passes(alone)
    torch.testing.assert_close(dx, acc + inputs.epilogue.others)


def test_exact_gradients_do_not_depend_on_how_images_are_split() -> None:
    inputs = make_inputs(images=37)
    wide = make_inputs(torch.float64, images=37)
    wide = replace(
        wide,
        dz=inputs.dz.double(),
        weight=inputs.weight.double(),
        epilogue=replace(
            inputs.epilogue,
            previous=inputs.epilogue.previous.double(),
            mask=inputs.epilogue.mask.double(),
            others=inputs.epilogue.others.double(),
        ),
    )
    for parts, whole in zip(fused_back._compute_exactly(inputs), fused_back.two_passes(wide), strict=True):
        torch.testing.assert_close(parts, whole.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_another_process_gets_the_same_problem(adds: bool, depthwise: bool) -> None:
    inputs = make_inputs(torch.bfloat16, adds=adds)
    kernels = triton_conv.HALF
    if depthwise:
        geometry, kernels = Geometry((2, 2), (1, 1), (1, 1), 6), triton_conv.DEPTHWISE
        dz, weight = image(2, 6, 5, 4, dtype=torch.bfloat16), image(6, 1, 3, 3, dtype=torch.bfloat16)
        inputs = replace(inputs, dz=dz, weight=weight, geometry=geometry)
        assert inputs.is_depthwise
    key = json.loads(json.dumps(fused_back._make_key(inputs)))
    names = [kernels[2].name, kernels[0].name]
    problem = problems.problem_of(dict(key), CPU, names)
    assert [candidate.name for candidate in problem.candidates] == names
    expected = fused_back.two_passes(fused_back._draw_similar(inputs))
    for got, usual in zip(problem.fallback(), expected, strict=True):
        assert torch.equal(got, usual)
    assert problem.unit == fused.UNITS[torch.bfloat16]


@dataclass(frozen=True)
class OnTheCPU(TritonKernel):
    """A substitute for a compiled kernel."""

    offset: float = 0.0

    @property
    def name(self) -> str:
        return "right" if self.offset == 0 else "wrong"

    def run_backward(
        self,
        dz: Tensor,
        weight: Tensor,
        geometry: Geometry,
        epilogue: BackwardEpilogue,
        results: Sequence[Tensor],
    ) -> None:
        inputs = BackwardInputs(dz, weight, results[0].shape, geometry, epilogue, len(results) > 1)
        for result, value in zip(results, fused_back.two_passes(inputs), strict=True):
            result.copy_(value + self.offset)


def test_the_chosen_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [OnTheCPU(1, 1, 1, 1, 1), OnTheCPU(1, 1, 1, 1, 1, offset=0.125)]
    monkeypatch.setattr(fused, "why_not_now", lambda x: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_conv, "supported_kernels", lambda *_, **__: {kernel.name: kernel for kernel in kernels})
    monkeypatch.setattr(triton_conv, "is_here", lambda: True)
    monkeypatch.setattr(fused_back, "_SUPPORTED", {})
    monkeypatch.setattr(fused_back, "AUTOTUNER", Autotuner(timer=lambda calls, device: [3.0, 2.0, 1.0][: len(calls)]))
    inputs = make_inputs()
    with pytest.warns(RuntimeWarning, match="kernel 'wrong' is not used for .*'fused_input_gradient'"):
        found = fused_back.input_gradients(inputs)
    torch.testing.assert_close(list(found), list(fused_back.two_passes(inputs)))
    kernel = fused_back.choose(inputs)
    assert kernel is not None
    assert kernel.name == "right"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"geometry": Geometry((2, 2), (1, 1))}, "the stride is (2, 2) in 1 group(s)"),
        ({"geometry": Geometry((1, 1), (1, 1), (1, 1), 2)}, "the stride is (1, 1) in 2 group(s)"),
        (
            {"geometry": Geometry((2, 2), (1, 1), (1, 1), 5), "weight": image(5, 1, 3, 3)},
            "x has 6 channels and the weight 5",
        ),
        ({"weight": torch.ones(8, 6, 3, 3)}, "not channels_last"),
        ({"weight": image(8, 6, 3, 3).half()}, "the dtypes are ['torch.float16', 'torch.float32']"),
        ({"weight": image(8, 5, 3, 3)}, "x has 6 channels and the weight 5"),
        ({}, None),
    ],
)
def test_which_kernels_may_run_depends_on_the_tensors(
    change: dict[str, object], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_conv, "is_here", lambda: True)
    found = fused_back.why_not_for(replace(make_inputs(), **change))
    assert found is None if why is None else why in str(found)
