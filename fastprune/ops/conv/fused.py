"""Convolution, scale, shift, activation and mask in one CUDA kernel, if there is one that is faster.

A part of :func:`fastprune.ops.masked_conv_bn_act` without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprune.ops.activations import ACTIVATIONS, DIFFERENTIABLE_BY_VALUE
from fastprune.ops.conv import library, triton_conv
from fastprune.ops.conv.agreement import Candidate, Problem
from fastprune.ops.conv.autotune import AUTOTUNER
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.triton_conv import Channels
from fastprune.ops.layout import has_rows
from fastprune.ops.library import _C
from fastprune.ops.masked_act import masked_act_in_place, masked_act_saving_in_place

Fallback = Callable[..., Sequence[Tensor]]
"""Computes (y,) or (y, saved) of x, weight and the three vectors, and of ``residual=``, as the library does."""

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-9}
"""The error of one rounding, relative to the number. tf32 has as many bits as float16 and is for two factors, which the
hardware cuts off if nobody rounds them, as under Triton."""


@dataclass(frozen=True)
class FusedGeometry(Geometry):
    """The geometry of a convolution, and what follows it.

    Args:
        activation: One of ``fastprune.ops.activations.ACTIVATIONS``.
        save: Whether the second result is wanted.
    """

    activation: str = "identity"
    save: bool = False


class ConvKernel(Protocol):
    """What a candidate has to offer."""

    @property
    def name(self) -> str:
        """A name that no other candidate has, and that stays."""

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        channels: Channels,
        geometry: FusedGeometry,
        results: Sequence[Tensor],
        residual: Tensor | None = None,
    ) -> None:
        """Write (y,) or (y, saved) into ``results``."""


def fused_conv(
    x: Tensor,
    weight: Tensor,
    channels: Channels,
    geometry: FusedGeometry,
    fallback: Fallback,
    residual: Tensor | None = None,
) -> Sequence[Tensor]:
    r"""Compute the convolution and everything behind it by the kernel that is known to be right and fastest here.

    .. math:: z = \mathrm{scale} \cdot (x * W) + \mathrm{shift} + \mathrm{residual}, \quad r = \mathrm{activation}(z),
        \quad y = \mathrm{mask} \cdot r

    Sums, scale, shift, activation and mask are float32, and each result is rounded once.

    Args:
        x: ``[N, C, H, W]``, float16, bfloat16 or float32.
        weight: ``[K, C / groups, R, S]``, dtype of ``x``.
        channels: Scale, shift and mask, each ``[K]`` float32 or None.
        geometry: The geometry, the activation, and whether there is a second result.
        fallback: Computes the same with the library. It runs where no kernel does, and kernels are compared with it.
        residual: ``[N, K, P, Q]``, or None: 0.

    Returns:
        ``(y,)``, or ``(y, saved)`` if the geometry says so: ``saved`` is what the gradient needs, ``r`` for identity,
        relu and relu6, ``z`` for silu and hardswish.
    """
    kernel = choose(x, weight, channels, geometry, fallback, residual)
    if kernel is None:
        return fallback(x, weight, channels, residual=residual)
    results = [_make_output(x, weight, geometry) for _ in range(2 if geometry.save else 1)]
    kernel.run(x, weight, channels, geometry, results, residual)
    return results


def choose(
    x: Tensor,
    weight: Tensor,
    channels: Channels,
    geometry: FusedGeometry,
    fallback: Fallback,
    residual: Tensor | None = None,
) -> ConvKernel | None:
    """Choose the kernel to run; None: the fallback. The first call for new shapes tries all kernels."""
    if why_not_now(x) is not None:
        return None
    key = _make_key(x, weight, channels, geometry, residual)
    kernels = _SUPPORTED.get((key, x.device))
    if kernels is None:
        kernels = _SUPPORTED[key, x.device] = _find_supported_here(x, weight, geometry, residual)

    def make_problem() -> Problem:
        inputs = _draw_similar(x, weight, channels, residual)
        return _make_problem(inputs, geometry, fallback, list(kernels.values()))

    winner = AUTOTUNER.choose(key, x.device, tuple(kernels), make_problem)
    return None if winner is None else kernels[winner]


def why_not_now(x: Tensor) -> str | None:
    """Return why no kernel may run now; None: one may.

    This can change between two calls with equal shapes, and is asked every time.
    """
    if not kernels_of_this_build() and not triton_conv.is_here():
        return "there is no Triton, and this build of fastprune has no CUTLASS kernels"
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, not on a CUDA device"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"the tensors are of the class {type(x).__name__}, which may have no memory"
    if torch.compiler.is_compiling():
        return "torch is tracing"
    if x.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "float32 is to be multiplied exactly: torch.backends.cudnn.allow_tf32 is off"
    return None


def why_not_for(x: Tensor, weight: Tensor, geometry: FusedGeometry, residual: Tensor | None = None) -> str | None:
    """Return why no kernel computes this; None: one may. The shapes decide; it is asked once for each."""
    if weight.device != x.device:
        return f"the tensors are on {x.device} and {weight.device}, not on one device"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"the dtypes are {x.dtype} and {weight.dtype}, not one of float16, bfloat16 and float32"
    if x.dim() != 4 or weight.dim() != 4:
        return "the convolution is not two-dimensional"
    if geometry.groups != 1 and not triton_conv.is_depthwise(x.shape[1], weight, geometry):
        return f"there are {geometry.groups} groups; the kernels have one, or one for each channel"
    if not all(has_rows(tensor) for tensor in (x, weight, residual) if tensor is not None):
        return "the tensors are not channels_last"
    if residual is not None and (residual.dtype != x.dtype or residual.device != x.device):
        return f"the residual is {residual.dtype} on {residual.device}, x is {x.dtype} on {x.device}"
    if x.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    return None


@dataclass(frozen=True)
class Kernel:
    """One kernel of CUTLASS.

    Args:
        index: Its place in the compiled module's list.
        name: Its name in the list.
        dtype: Name of the dtype that it computes in.
        capabilities: The lowest and the highest capability of a device that it runs on, 10 * major + minor.
        workspace: Bytes that it needs for one set of shapes.
    """

    index: int
    name: str
    dtype: str
    capabilities: tuple[int, int]
    workspace: int = 0

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        channels: Channels,
        geometry: FusedGeometry,
        results: Sequence[Tensor],
        residual: Tensor | None = None,
    ) -> None:
        """Write (y,) or (y, saved) into ``results``; there is no residual."""
        if residual is not None:
            raise ValueError(f"residual: got one, kernel {self.name!r} adds none")
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=x.device) if self.workspace else None
        _C.fused_conv(
            x,
            weight,
            *channels,
            results[0],
            results[1] if len(results) > 1 else None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.activation,
            self.index,
            workspace,
        )


@cache
def kernels_of_this_build() -> tuple[Kernel, ...]:
    """Return all kernels, for every dtype and device; none without CUDA and CUTLASS."""
    return tuple(Kernel(index=index, **facts) for index, facts in enumerate(_C.fused_conv_candidates()))


def find_supported(
    x: Tensor,
    weight: Tensor,
    results: Sequence[Tensor],
    geometry: FusedGeometry,
    capability: int,
    residual: Tensor | None = None,
) -> dict[str, ConvKernel]:
    """Return the kernels that take these tensors on a device of this capability (10 * major + minor), by name."""
    kernels: dict[str, ConvKernel] = {}
    for kernel in kernels_of_this_build() if residual is None and geometry.groups == 1 else ():
        first, last = kernel.capabilities
        if kernel.dtype != DTYPES[x.dtype] or not first <= capability <= last:
            continue
        saved = results[1] if len(results) > 1 else None
        window = geometry.stride, geometry.padding, geometry.dilation
        workspace = _C.fused_conv_workspace(x, weight, results[0], saved, *window, kernel.index)
        if workspace is not None:
            kernels[kernel.name] = replace(kernel, workspace=workspace)
    depthwise = geometry.groups > 1
    return kernels | triton_conv.supported_kernels([x, weight, *results, residual], capability, depthwise=depthwise)


def library_conv(
    x: Tensor, weight: Tensor, channels: Channels, geometry: FusedGeometry, residual: Tensor | None = None
) -> Sequence[Tensor]:
    """Compute the same in plain torch: a convolution rounded to the dtype of ``x``, then the rest in float32.

    Float64 is computed in float64.
    """
    z = F.conv2d(x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift, mask = (None if v is None else v.to(wide)[None, :, None, None] for v in channels)
    z = z.to(wide)
    z = z if scale is None else z * scale
    z = z if shift is None else z + shift
    z = z if residual is None else z + residual
    r = ACTIVATIONS[geometry.activation](z)
    y = (r if mask is None else r * mask).to(x.dtype)
    if not geometry.save:
        return (y,)
    return y, (r if geometry.activation in DIFFERENTIABLE_BY_VALUE else z).to(x.dtype)


def two_passes(
    x: Tensor, weight: Tensor, channels: Channels, geometry: FusedGeometry, residual: Tensor | None = None
) -> Sequence[Tensor]:
    """Compute the same with the library's convolution, and one pass for everything behind it."""
    z = library.convolve(x, weight, None, geometry)
    following = masked_act_saving_in_place if geometry.save else masked_act_in_place
    found = following(z, *channels, residual=residual, activation=geometry.activation)
    return (found,) if isinstance(found, Tensor) else found


def problem_of(key: Mapping[str, Any], device: torch.device, names: Sequence[str]) -> Problem:
    """Make the problem of a key of :func:`choose`, for a process that has nothing else.

    Args:
        key: The key; tuples may have become lists.
        device: Where to compute.
        names: The kernels to try.
    """
    dtype = {name: dtype for dtype, name in DTYPES.items()}[key["dtypes"][0]]

    def empty(name: str) -> Tensor:
        return torch.empty_strided(key[name], key[f"{name}_strides"], dtype=dtype, device=device)

    def vector(wanted: bool) -> Tensor | None:
        return torch.empty(key["weight"][0], device=device) if wanted else None

    stride, padding, dilation = (tuple(key[name]) for name in ("stride", "padding", "dilation"))
    geometry = FusedGeometry(stride, padding, dilation, key["groups"], key["activation"], key["save"])
    scale, shift, mask = map(vector, key["vectors"])
    x, weight, residual = empty("x"), empty("weight"), None
    if key["residual_strides"] is not None:
        size = geometry.output_size(x.shape, weight.shape)
        residual = torch.empty_strided(size, key["residual_strides"], dtype=dtype, device=device)
    inputs = _draw_similar(x, weight, (scale, shift, mask), residual)
    kernels = _find_supported_here(inputs.x, inputs.weight, geometry, inputs.residual)
    fallback = partial(two_passes, geometry=geometry)
    return _make_problem(inputs, geometry, fallback, [kernels[name] for name in names])


_SUPPORTED: dict[Any, dict[str, ConvKernel]] = {}


def _find_supported_here(
    x: Tensor, weight: Tensor, geometry: FusedGeometry, residual: Tensor | None = None
) -> dict[str, ConvKernel]:
    if why_not_for(x, weight, geometry, residual) is not None:
        return {}
    major, minor = torch.cuda.get_device_capability(x.device)
    results = [_make_output(x, weight, geometry) for _ in range(2 if geometry.save else 1)]
    try:
        return find_supported(x, weight, results, geometry, 10 * major + minor, residual)
    except ValueError:  # too large for 32-bit indices; what is malformed, the fallback names better
        return {}


def _make_output(x: Tensor, weight: Tensor, geometry: FusedGeometry) -> Tensor:
    shape = geometry.output_size(x.shape, weight.shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _make_key(
    x: Tensor, weight: Tensor, channels: Channels, geometry: FusedGeometry, residual: Tensor | None = None
) -> tuple[tuple[str, Any], ...]:
    """Return everything but the values that a kernel could depend on."""
    return (
        ("operator", "fused_conv"),
        ("dtypes", (DTYPES.get(x.dtype), DTYPES.get(weight.dtype))),
        ("x", tuple(x.shape)),
        ("x_strides", x.stride()),
        ("x_alignment", alignment(x)),
        ("weight", tuple(weight.shape)),
        ("weight_strides", weight.stride()),
        ("weight_alignment", alignment(weight)),
        ("residual_strides", None if residual is None else residual.stride()),
        ("residual_alignment", None if residual is None else alignment(residual)),
        ("vectors", tuple(vector is not None for vector in channels)),
        ("stride", geometry.stride),
        ("padding", geometry.padding),
        ("dilation", geometry.dilation),
        ("groups", geometry.groups),
        ("activation", geometry.activation),
        ("save", geometry.save),
    )


def alignment(tensor: Tensor) -> int:
    """Return the largest power of two up to 16 that divides the address."""
    return math.gcd(tensor.data_ptr(), 16)


@dataclass(frozen=True)
class _Inputs:
    x: Tensor
    weight: Tensor
    channels: Channels
    residual: Tensor | None = None


def _draw_similar(x: Tensor, weight: Tensor, channels: Channels, residual: Tensor | None = None) -> _Inputs:
    """Draw numbers in the shapes and strides of real inputs: the choice must not depend on values.

    They have unit variance behind the convolution. There are closed channels and open ones.
    """
    random = torch.Generator(x.device).manual_seed(0)

    def normal(like: Tensor, deviation: float) -> Tensor:
        into = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        return into.copy_(torch.randn(like.shape, generator=random, device=like.device) * deviation)

    def uniform(like: Tensor | None, low: float, high: float) -> Tensor | None:
        return None if like is None else torch.empty_like(like).uniform_(low, high, generator=random)

    scale, shift, mask = channels
    return _Inputs(
        normal(x, 1.0),
        normal(weight, weight[0].numel() ** -0.5),
        (uniform(scale, 0.5, 2.0), uniform(shift, -1.0, 1.0), None if mask is None else draw_mask(mask, random)),
        None if residual is None else normal(residual, 1.0),
    )


def draw_mask(like: Tensor, random: torch.Generator) -> Tensor:
    """Draw a mask: a quarter closed, a quarter open, the rest between; the first channel open."""
    mask = (torch.empty_like(like).uniform_(-0.5, 1.5, generator=random)).clamp(0, 1)
    mask[:1] = 1
    return mask


def _make_problem(
    inputs: _Inputs, geometry: FusedGeometry, fallback: Fallback, kernels: Sequence[ConvKernel]
) -> Problem:
    x, weight, channels, residual = inputs.x, inputs.weight, inputs.channels, inputs.residual

    def make_candidate(kernel: ConvKernel) -> Candidate:
        return Candidate(kernel.name, lambda results: kernel.run(x, weight, channels, geometry, results, residual))

    def usual() -> Sequence[Tensor]:
        results = fallback(x, weight, channels, residual=residual)
        return [result.contiguous(memory_format=torch.channels_last) for result in results]

    return Problem(
        fallback=usual,
        exact=lambda: _compute_exactly(inputs, geometry),
        candidates=[make_candidate(kernel) for kernel in kernels],
        unit=UNITS[x.dtype],
    )


def _compute_exactly(inputs: _Inputs, geometry: FusedGeometry) -> Sequence[Tensor]:
    """Compute in float64, a few images at a time to save memory, and keep float32."""
    weight = inputs.weight.double()
    images = inputs.x.split(16)
    residuals = [None] * len(images) if inputs.residual is None else inputs.residual.split(16)
    parts = [
        library_conv(x.double(), weight, inputs.channels, geometry, None if more is None else more.double())
        for x, more in zip(images, residuals, strict=True)
    ]
    return [torch.cat([result.float() for result in results]) for results in zip(*parts, strict=True)]
