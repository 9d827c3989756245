"""The gradient of a convolution's input and everything that follows it in one CUDA kernel, if one is faster.

Forward counterpart: :mod:`fastprune.ops.conv.fused`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.activations import ACTIVATIONS
from fastprune.ops.conv import fused, triton_conv
from fastprune.ops.conv.agreement import Candidate, Problem
from fastprune.ops.conv.autotune import AUTOTUNER
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.open_channels import input_gradient_of_open
from fastprune.ops.conv.triton_conv import BackwardEpilogue, TritonKernel
from fastprune.ops.layout import has_rows
from fastprune.ops.masked_act import masked_act_backward


@dataclass(frozen=True)
class BackwardInputs:
    """What a gradient is computed from.

    Args:
        dz: ``[N, open, P, Q]``; the gradient of the convolution's outputs behind it is 0.
        weight: ``[K, C, R, S]``.
        size: Shape of the convolution's input, ``[N, C, H, W]``.
        geometry: The geometry.
        epilogue: What follows.
        want_dmask: Whether the gradient of the epilogue's mask is wanted.
    """

    dz: Tensor
    weight: Tensor
    size: Sequence[int]
    geometry: Geometry
    epilogue: BackwardEpilogue
    want_dmask: bool

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel is convolved alone, and the gradients of all of them are there."""
        return triton_conv.is_depthwise(self.dz.shape[1], self.weight, self.geometry)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The images that are read, by name."""
        named = {"dz": self.dz, "previous": self.epilogue.previous, "others": self.epilogue.others}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def input_gradients(inputs: BackwardInputs) -> tuple[Tensor, Tensor | None]:
    r"""Compute the gradients of z and the mask of a convolution's input ``mask * r``, ``r = activation(z)``.

    .. math:: d = \mathrm{dz} * W^\top + \mathrm{others}, \quad
        dz_c = \mathrm{mask}_c \, d_c \, \mathrm{activation}'(r_c), \quad d\mathrm{mask}_c = \sum d_c \, r_c

    Args:
        inputs: What they are computed from.

    Returns:
        ``[N, C, H, W]``, and ``[C]`` float32 if it is wanted.
    """
    kernel = choose(inputs)
    if kernel is None:
        dx, *dmask = two_passes(inputs)
        return dx, dmask[0] if dmask else None
    dz, size, epilogue = inputs.dz, inputs.size, inputs.epilogue
    results = [torch.empty(*size, dtype=dz.dtype, device=dz.device, memory_format=torch.channels_last)]
    if inputs.want_dmask:
        results.append(torch.empty(size[1], dtype=torch.float32, device=dz.device))
    kernel.run_backward(dz, inputs.weight, inputs.geometry, epilogue, results)
    return results[0], results[1] if inputs.want_dmask else None


def choose(inputs: BackwardInputs) -> TritonKernel | None:
    """Choose the kernel to run; None: the library. The first call for new shapes tries all kernels."""
    device = inputs.dz.device
    if fused.why_not_now(inputs.dz) is not None:
        return None
    key = _make_key(inputs)
    kernels = _SUPPORTED.get((key, device))
    if kernels is None:
        kernels = _SUPPORTED[key, device] = _find_supported_here(inputs)

    def make_problem() -> Problem:
        return _make_problem(_draw_similar(inputs), list(kernels.values()))

    winner = AUTOTUNER.choose(key, device, tuple(kernels), make_problem)
    return None if winner is None else kernels[winner]


_SUPPORTED: dict[Any, dict[str, TritonKernel]] = {}


def _find_supported_here(inputs: BackwardInputs) -> dict[str, TritonKernel]:
    if why_not_for(inputs) is not None:
        return {}
    major, minor = torch.cuda.get_device_capability(inputs.dz.device)
    tensors = [*inputs.tensors.values(), inputs.weight]
    return triton_conv.supported_kernels(tensors, 10 * major + minor, depthwise=inputs.is_depthwise)


def why_not_for(inputs: BackwardInputs) -> str | None:
    """Return why no kernel computes this; None: one may. The shapes decide; it is asked once for each."""
    if not triton_conv.is_here():
        return "there is no Triton"
    geometry, weight, tensors = inputs.geometry, inputs.weight, [*inputs.tensors.values()]
    if not inputs.is_depthwise and (geometry.groups != 1 or geometry.stride != (1, 1)):
        return f"the stride is {geometry.stride} in {geometry.groups} group(s); the kernels have stride 1 and one group"
    if inputs.dz.dtype not in fused.DTYPES or any(t.dtype != inputs.dz.dtype for t in (weight, *tensors)):
        return f"the dtypes are {sorted({str(t.dtype) for t in (weight, *tensors)})}, not one that kernels multiply"
    if weight.shape[1] * geometry.groups != inputs.size[1]:
        return f"x has {inputs.size[1]} channels and the weight {weight.shape[1] * geometry.groups}"
    if not all(has_rows(tensor) for tensor in (weight, *tensors)):
        return "the tensors are not channels_last"
    if any(tensor.numel() == 0 for tensor in (weight, *tensors)):
        return "there is nothing to compute"
    return None


def two_passes(inputs: BackwardInputs) -> Sequence[Tensor]:
    """Compute the same by the library's gradient and one pass behind it."""
    epilogue = inputs.epilogue
    dx = input_gradient_of_open(inputs.dz, [*inputs.size], inputs.weight, inputs.geometry)
    if epilogue.previous is None:
        return (dx if epilogue.others is None else dx + epilogue.others,)
    into, dmask, _, _ = masked_act_backward(
        dx, epilogue.previous, epilogue.mask, others=epilogue.others, activation=epilogue.activation,
        want_dx=True, want_dmask=inputs.want_dmask,
    )  # fmt: skip
    return [result for result in (into, dmask) if result is not None]


def problem_of(key: Mapping[str, Any], device: torch.device, names: Sequence[str]) -> Problem:
    """Make the problem of a key of :func:`choose`, for a process that has nothing else."""
    dtype = {name: dtype for dtype, name in fused.DTYPES.items()}[key["dtypes"][0]]

    def empty(name: str, size: Sequence[int]) -> Tensor | None:
        strides = key[f"{name}_strides"]
        return None if strides is None else torch.empty_strided(size, strides, dtype=dtype, device=device)

    size, weight_size = key["size"], key["weight"]
    stride, padding, dilation = (tuple(key[name]) for name in ("stride", "padding", "dilation"))
    geometry = Geometry(stride, padding, dilation, key["groups"])
    output = geometry.output_size(size, weight_size)
    dz, weight = empty("dz", [output[0], key["open"], *output[2:]]), empty("weight", weight_size)
    assert dz is not None
    assert weight is not None
    mask = torch.empty(size[1], device=device) if key["mask"] else None
    epilogue = BackwardEpilogue(empty("previous", size), mask, empty("others", size), key["activation"])
    inputs = _draw_similar(BackwardInputs(dz, weight, size, geometry, epilogue, key["want_dmask"]))
    kernels = {kernel.name: kernel for kernel in (*triton_conv.HALF, *triton_conv.TF32, *triton_conv.DEPTHWISE)}
    return _make_problem(inputs, [kernels[name] for name in names])


def _make_key(inputs: BackwardInputs) -> tuple[tuple[str, Any], ...]:
    """Return everything but the values that a kernel could depend on."""
    tensors = {"weight": inputs.weight, **inputs.tensors}
    epilogue = inputs.epilogue
    layouts: list[tuple[str, Any]] = []
    for name in ("dz", "weight", "previous", "others"):
        tensor = tensors.get(name)
        layouts.append((f"{name}_strides", None if tensor is None else tensor.stride()))
        layouts.append((f"{name}_alignment", None if tensor is None else fused.alignment(tensor)))
    return (
        ("operator", "fused_input_gradient"),
        ("dtypes", tuple(fused.DTYPES.get(tensor.dtype) for tensor in (inputs.dz, *tensors.values()))),
        ("size", tuple(inputs.size)),
        ("open", inputs.dz.shape[1]),
        ("weight", tuple(inputs.weight.shape)),
        *layouts,
        ("mask", epilogue.mask is not None),
        ("activation", epilogue.activation),
        ("want_dmask", inputs.want_dmask),
        ("stride", inputs.geometry.stride),
        ("padding", inputs.geometry.padding),
        ("dilation", inputs.geometry.dilation),
        ("groups", inputs.geometry.groups),
    )


def _draw_similar(inputs: BackwardInputs) -> BackwardInputs:
    """Draw numbers in the shapes and strides of real inputs; see :func:`fastprune.ops.conv.fused.choose`."""
    random = torch.Generator(inputs.dz.device).manual_seed(0)

    def normal(like: Tensor, deviation: float, change: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
        into = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        return into.copy_(change(torch.randn(like.shape, generator=random, device=like.device) * deviation))

    epilogue = inputs.epilogue
    previous, mask, others = epilogue.previous, epilogue.mask, epilogue.others
    drawn = replace(
        epilogue,
        previous=None if previous is None else normal(previous, 3.0, ACTIVATIONS[epilogue.activation]),
        mask=None if mask is None else fused.draw_mask(mask, random),
        others=None if others is None else normal(others, 1.0),
    )
    terms = inputs.dz.shape[1] * inputs.weight[0, 0].numel() // inputs.geometry.groups
    return replace(
        inputs, dz=normal(inputs.dz, 1.0), weight=normal(inputs.weight, terms**-0.5), epilogue=drawn
    )  # fmt: skip


def _make_problem(inputs: BackwardInputs, kernels: Sequence[TritonKernel]) -> Problem:
    def run(kernel: TritonKernel, results: Sequence[Tensor]) -> None:
        kernel.run_backward(inputs.dz, inputs.weight, inputs.geometry, inputs.epilogue, results)

    def usual() -> Sequence[Tensor]:
        dx, *dmask = two_passes(inputs)
        return [dx.contiguous(memory_format=torch.channels_last), *dmask]

    return Problem(
        fallback=usual,
        exact=lambda: _compute_exactly(inputs),
        candidates=[Candidate(kernel.name, partial(run, kernel)) for kernel in kernels],
        unit=fused.UNITS[inputs.dz.dtype],
    )


def _compute_exactly(inputs: BackwardInputs) -> Sequence[Tensor]:
    """Compute in float64, a few images at a time to save memory, and keep float32."""
    epilogue, parts = inputs.epilogue, []
    for start in range(0, inputs.size[0], 16):
        images = slice(start, start + 16)
        previous, others = (
            None if tensor is None else tensor[images].double() for tensor in (epilogue.previous, epilogue.others)
        )
        mask = None if epilogue.mask is None else epilogue.mask.double()
        dz = inputs.dz[images].double()
        part = replace(
            inputs, dz=dz, weight=inputs.weight.double(), size=[dz.shape[0], *inputs.size[1:]],
            epilogue=BackwardEpilogue(previous, mask, others, epilogue.activation),
        )  # fmt: skip
        parts.append(two_passes(part))
    dx = torch.cat([results[0].float() for results in parts])
    if not inputs.want_dmask:
        return [dx]
    return [dx, torch.stack([results[1] for results in parts]).sum(0).float()]
