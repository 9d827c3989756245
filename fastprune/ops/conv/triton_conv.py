"""Candidates for convolutions on CUDA that Triton compiles at run time: for users who installed without nvcc.

Sizes of blocks are tried by the autotuner beside CUTLASS's kernels, where these were built, and the library.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprune.ops.activations import DIFFERENTIABLE_BY_VALUE
from fastprune.ops.conv.library import Geometry

if TYPE_CHECKING:
    from fastprune.ops.conv.fused import FusedGeometry

Channels = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Scale, shift and mask, each ``[K]`` float32, or None: 1, 0 and 1."""

BAND = 8
LEAST_CAPABILITY = 80
MOST_ELEMENTS = 2**31
"""Rows, columns and weights are counted in 32 bits; places of pixels in 64."""


@cache
def is_here() -> bool:
    """Return whether Triton can be imported, and ``FASTPRUNE_TRITON=0`` does not switch it off."""
    return os.environ.get("FASTPRUNE_TRITON", "1") != "0" and importlib.util.find_spec("triton") is not None


@cache
def version() -> str:
    """Return Triton's version with a checksum of our kernels; "": there is no Triton."""
    if not is_here():
        return ""
    sources = [Path(__file__), Path(__file__).with_name("triton_kernel.py")]
    checksum = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    return f"{importlib.metadata.version('triton')} {checksum}"


@dataclass(frozen=True)
class TritonKernel:
    """One choice of blocks.

    Args:
        rows: Pixels of a block.
        columns: Output channels of a block.
        depth: Input channels of one product of blocks; 0: the kernel of depthwise convolutions.
        warps: Warps of a block.
        stages: Blocks of products whose loads are under way at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The name by which a choice is remembered."""
        if self.depth == 0:
            return f"triton depthwise {self.rows}x{self.columns} w{self.warps}"
        return f"triton {self.rows}x{self.columns}x{self.depth} w{self.warps} s{self.stages}"

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        channels: Channels,
        geometry: FusedGeometry,
        results: Sequence[Tensor],
        residual: Tensor | None = None,
    ) -> None:
        """Write (y,) or (y, saved) into ``results``; see :func:`fastprune.ops.conv.fused.fused_conv`.

        Args:
            x: ``[N, C, H, W]``.
            weight: ``[K, C, R, S]``.
            channels: Scale, shift and mask.
            geometry: The geometry, the activation, and whether there is a second result.
            results: ``[N, K, P, Q]`` each.
            residual: ``[N, K, P, Q]``, added before the activation.
        """
        _launch(
            self, x, weight, weight.stride(), weight.shape[2:], (geometry.stride, geometry.padding, geometry.dilation),
            y=results[0], second=results[1] if len(results) > 1 else None, channels=channels, added=residual,
            backward=False, activation=geometry.activation,
            saves_argument=geometry.activation not in DIFFERENTIABLE_BY_VALUE,
        )  # fmt: skip

    def run_backward(
        self,
        dz: Tensor,
        weight: Tensor,
        geometry: Geometry,
        epilogue: BackwardEpilogue,
        results: Sequence[Tensor],
    ) -> None:
        """Write the gradient of x, and that of its mask if there is a second result, into ``results``.

        Args:
            dz: ``[N, open, P, Q]``.
            weight: ``[K, C, R, S]``; the first ``open`` of K are read.
            geometry: That of the convolution, whose stride is 1 unless it is depthwise.
            epilogue: What follows the gradient of the convolution.
            results: ``[N, C, H, W]``, ``[C]`` float32.
        """
        dx = results[0]
        sums = None
        if len(results) > 1:
            if epilogue.previous is None:
                raise ValueError("results: got two without previous, from which the gradient of the mask is computed")
            blocks = -(-dx.numel() // dx.shape[1] // self.rows)
            sums = torch.empty(blocks, dx.shape[1], dtype=torch.float32, device=dx.device)
        window = weight.shape[2], weight.shape[3]
        if self.depth == 0:
            read, strides, numbers = weight, weight.stride(), geometry.numbers[:3]
        else:
            # Taps are read from the last one backwards.
            padding_h, padding_w = (geometry.dilation[d] * (window[d] - 1) - geometry.padding[d] for d in (0, 1))
            read = weight[:, :, window[0] - 1 :, window[1] - 1 :]
            strides = weight.stride(1), weight.stride(0), -weight.stride(2), -weight.stride(3)
            numbers = (1, 1), (padding_h, padding_w), geometry.dilation
        _launch(
            self, dz, read, strides, window, numbers, y=dx, second=epilogue.previous,
            channels=(None, None, epilogue.mask), added=epilogue.others, sums=sums, backward=True,
            activation=epilogue.activation,
        )  # fmt: skip
        if sums is not None:
            torch.sum(sums, 0, out=results[1])


@dataclass(frozen=True)
class BackwardEpilogue:
    """What follows the gradient of a convolution's input ``mask * r``, ``r = activation(z)``.

    Args:
        previous: r, ``[N, C, H, W]``; None: x is no activation, and its gradient is wanted.
        mask: ``[C]`` float32; None: 1.
        others: The gradient of ``mask * r`` from its other readers; None: 0.
        activation: One whose derivative is a function of r.
    """

    previous: Tensor | None = None
    mask: Tensor | None = None
    others: Tensor | None = None
    activation: str = "identity"


HALF = tuple(
    TritonKernel(*sizes)
    for sizes in (
        (128, 128, 64, 8, 3),
        (256, 64, 32, 8, 4),
        (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (128, 32, 32, 4, 4),
    )
)
"""Choices for float16 and bfloat16. None spills registers (``bench/registers.py``)."""

TF32 = tuple(
    TritonKernel(*sizes)
    for sizes in ((128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 4), (128, 32, 16, 4, 4))
)
"""Choices for float32, multiplied as tf32."""


DEPTHWISE = tuple(
    TritonKernel(*sizes, depth=0, warps=4, stages=1) for sizes in ((64, 32), (32, 64), (16, 64), (32, 32))
)
"""Choices for depthwise convolutions."""


def is_depthwise(x_channels: int, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether every channel is convolved alone."""
    return 1 < x_channels == weight.shape[0] == geometry.groups


def supported_kernels(
    tensors: Sequence[Tensor | None], capability: int, *, depthwise: bool = False
) -> dict[str, TritonKernel]:
    """Return the choices for these tensors on a device of this capability (10 * major + minor), by name."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not is_here() or capability < LEAST_CAPABILITY or any(t.numel() >= MOST_ELEMENTS for t in given):
        return {}
    dense = TF32 if given[0].dtype == torch.float32 else HALF
    return {kernel.name: kernel for kernel in (DEPTHWISE if depthwise else dense)}


def _launch(
    kernel: TritonKernel,
    x: Tensor,
    weight: Tensor,
    weight_strides: Sequence[int],
    window: Sequence[int],
    geometry: tuple[Any, Any, Any],
    *,
    y: Tensor,
    second: Tensor | None,
    channels: Channels,
    added: Tensor | None,
    backward: bool,
    activation: str,
    saves_argument: bool = False,
    sums: Tensor | None = None,
) -> None:
    from fastprune.ops.conv.triton_kernel import conv_kernel, depthwise_kernel

    scale, shift, mask = channels
    rows, columns = y.numel() // y.shape[1], y.shape[1]
    pitch = pitch_of(x)
    blocks = -(-rows // kernel.rows) * -(-columns // kernel.columns)
    # What is absent is never read; y stands in for its address.
    optional = [y if tensor is None else tensor for tensor in (second, scale, shift, mask, added, sums)]
    images = x.shape[2] * x.shape[3] * pitch, x.shape[3] * pitch, pitch
    pitches = [0 if tensor is None else pitch_of(tensor) for tensor in (y, second, added)]
    numbers = [number for pair in geometry for number in pair]
    constants = {
        "TAPS_H": window[0], "TAPS_W": window[1], "BACKWARD": backward, "ACTIVATION": activation,
        "SAVES_ARGUMENT": saves_argument, "HAS_SECOND": second is not None, "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None, "HAS_MASK": mask is not None, "HAS_ADDED": added is not None,
        "HAS_SUMS": sums is not None, "BLOCK_ROWS": kernel.rows, "BLOCK_COLUMNS": kernel.columns,
        "num_warps": kernel.warps, "num_stages": kernel.stages,
    }  # fmt: skip
    with _device_of(x):
        if kernel.depth == 0:
            depthwise_kernel[(blocks,)](
                x, weight, y, *optional, rows, columns, *x.shape[2:], *y.shape[2:], *images,
                weight_strides[0], *weight_strides[2:], *pitches, *numbers, **constants,
            )  # fmt: skip
            return
        conv_kernel[(blocks,)](
            x, weight, y, *optional, rows, columns, x.shape[1], *x.shape[2:],
            *y.shape[2:], *images, *weight_strides, *pitches, *numbers, **constants,
            PRECISION="tf32", WIDENS=not x.is_cuda and x.dtype == torch.bfloat16, BLOCK_DEPTH=kernel.depth, BAND=BAND,
        )  # fmt: skip


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def pitch_of(x: Tensor) -> int:
    """Return the distance of neighbouring pixels in channels_last, or in some channels of a wider such tensor."""
    for dim in (3, 2, 0):
        if x.size(dim) > 1:
            return x.stride(dim)
    return x.size(1)
