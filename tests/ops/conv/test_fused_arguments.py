"""The binding of the fused convolutions refuses bad arguments by name, and none crashes it."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprune import _C
from fastprune.ops.conv import fused, triton_conv
from fastprune.ops.conv.fused import FusedGeometry

HAS_KERNELS = bool(_C.fused_conv_candidates())
NO_KERNEL = r"one on CUDA|a build of fastprune with CUTLASS"


def image(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def arguments() -> dict[str, object]:
    return {
        "x": image(2, 16, 9, 7),
        "weight": image(24, 16, 3, 3),
        "scale": torch.ones(24),
        "shift": torch.zeros(24),
        "mask": torch.ones(24),
        "y": image(2, 24, 5, 4),
        "saved": image(2, 24, 5, 4),
        "stride": (2, 2),
        "padding": (1, 1),
        "dilation": (1, 1),
        "activation": "relu",
        "candidate": 0,
    }


def test_good_arguments_reach_the_kernel():
    needs = "one on CUDA" if HAS_KERNELS else "a build of fastprune with CUTLASS; this one has no CUTLASS kernels"
    for change in ({}, {"scale": None}, {"shift": None, "mask": None}, {"saved": None}):
        with pytest.raises(ValueError, match=f"needs {needs}"):
            _C.fused_conv(**(arguments() | change))


WIDE = image(2, 32, 9, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 16, 9)}, "x: got 3 dimensions, needs four"),
        ({"x": torch.ones(2, 16, 9, 7).half()}, r"x: got strides \[1008, 63, 7, 1\] .* needs a channels_last tensor"),
        ({"x": WIDE[:, ::2]}, r"x: got strides \[2016, 2, 224, 32\]"),
        ({"x": WIDE[:, :16].flip(0)[:, :, :, ::2]}, "x: got strides"),
        ({"x": WIDE[:, :16, ::2]}, "x: got strides"),
        ({"x": WIDE[:, :1].expand(2, 16, 9, 7)}, "x: got strides"),
        ({"x": image(2, 0, 9, 7)}, "x: got no channel or no pixel, needs at least one"),
        ({"x": image(2, 16, 0, 7)}, "x: got no channel or no pixel"),
        ({"x": image(2, 8, 9, 7)}, "weight: got 16 input channels, needs 8, as many as x has"),
        ({"weight": image(24, 16, 12, 3)}, r"weight: got a window of \[12, 3\], needs one that fits .* \[11, 9\]"),
        ({"weight": image(24, 16, 0, 3)}, r"weight: got a window of \[0, 3\]"),
        ({"dilation": (6, 1)}, r"weight: got a window of \[3, 3\]"),
        ({"weight": torch.ones(24, 16, 3, 3).half()}, "weight: got strides"),
        ({"y": image(2, 24, 4, 4)}, r"y: got shape \[2, 24, 4, 4\], needs shape \[2, 24, 5, 4\]"),
        ({"y": image(1, 24, 5, 4).expand(2, 24, 5, 4)}, "y: got strides"),
        ({"saved": image(2, 24, 5, 5)}, r"saved: got shape \[2, 24, 5, 5\]"),
        ({"stride": (0, 2)}, r"stride: got 0, needs integers in \[1, 32768\]"),
        ({"stride": (2, 1 << 40)}, "stride: got 1099511627776"),
        ({"padding": (-1, 0)}, r"padding: got -1, needs integers in \[0, 32768\]"),
        ({"dilation": (1, 0)}, "dilation: got 0"),
        ({"activation": "gelu"}, "activation: got 'gelu', needs identity, relu, relu6, silu or hardswish"),
        ({"scale": torch.ones(16)}, r"scale: got shape \[16\], needs shape \[24\]"),
        ({"shift": torch.ones(48)[::2]}, "shift: got a strided view"),
        ({"mask": torch.ones(24, 1)}, r"mask: got shape \[24, 1\]"),
        ({"candidate": -1}, "candidate: got -1"),
        ({"candidate": 1 << 40}, "candidate: got 1099511627776"),
    ],
)
def test_wrong_values(change, message):
    with pytest.raises(ValueError, match=message):
        _C.fused_conv(**(arguments() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": image(2, 16, 9, 7, dtype=torch.float64)}, "x: got another dtype, needs float16, bfloat16 or float32"),
        ({"x": image(2, 16, 9, 7, dtype=torch.float32)}, "weight: got dtype float16, needs float32, the dtype of x"),
        ({"weight": image(24, 16, 3, 3, dtype=torch.bfloat16)}, "weight: got dtype bfloat16, needs float16"),
        ({"y": image(2, 24, 5, 4, dtype=torch.bfloat16)}, "y: got dtype bfloat16, needs float16"),
        ({"saved": image(2, 24, 5, 4, dtype=torch.int16)}, "saved: got another dtype"),
        ({"scale": torch.ones(24).double()}, "scale: got dtype float64, needs dtype float32"),
        ({"mask": torch.ones(24).half()}, "mask: got dtype float16, needs dtype float32"),
        ({"x": None}, "x: got an object of type NoneType, needs a tensor"),
        ({"y": "y"}, "y: got an object of type str"),
        ({"weight": torch.empty(24, 16, 3, 3, device="meta")}, "weight: got a Tensor that does not lend its memory"),
    ],
)
def test_wrong_types(change, message):
    with pytest.raises(TypeError, match=message):
        _C.fused_conv(**(arguments() | change))


def test_outputs_share_no_memory():
    both = image(2, 48, 5, 4)
    memory = torch.zeros(10_000, dtype=torch.float16)
    x = memory[:2016].view(2, 9, 7, 16).permute(0, 3, 1, 2)
    inside_x = memory[2000 : 2000 + 960].view(2, 5, 4, 24).permute(0, 3, 1, 2)
    vector = torch.zeros(600)
    inside_vector = vector.view(torch.float16)[100 : 100 + 960].view(2, 5, 4, 24).permute(0, 3, 1, 2)
    for change, message in (
        ({"y": both[:, :24], "saved": both[:, 24:]}, "saved: got memory that overlaps y"),
        ({"x": x, "y": inside_x}, "y: got memory that overlaps x"),
        ({"weight": image(24, 16, 3, 3), "scale": vector[60:84], "y": inside_vector}, "y: got memory that overlaps sc"),
        ({"shift": vector[60:84], "saved": inside_vector}, "saved: got memory that overlaps shift"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.fused_conv(**(arguments() | change))


def test_read_only_outputs():
    y = np.zeros((2, 5, 4, 24), np.float16).transpose(0, 3, 1, 2)
    y.flags.writeable = False
    with pytest.raises((TypeError, ValueError), match=r"y: got a.*read-?only"):
        _C.fused_conv(**(arguments() | {"y": y}))


def test_sizes_beyond_32_bits():
    # Nothing is read: torch reserves address space, which no page backs.
    large = torch.empty((1 << 20, 1, 1, 2048), dtype=torch.float16).permute(0, 3, 1, 2)[:, :16]
    with pytest.raises(ValueError, match=r"x: got 4096\.0* MiB, needs fewer than 2048: indices have 32 bits"):
        _C.fused_conv(**(arguments() | {"x": large}))
    with pytest.raises(ValueError, match="y: got shape"):
        _C.fused_conv(**(arguments() | {"x": torch.empty((0, 16, 1 << 29, 1 << 29), dtype=torch.float16)}))
    with pytest.raises(ValueError, match="x: got a size of 2147483648, needs sizes below"):
        _C.fused_conv(**(arguments() | {"x": torch.empty((0, 16, 1 << 31, 1), dtype=torch.float16)}))


def test_prefixes_and_sizes_of_one_are_taken():
    views = [
        image(2, 64, 9, 7)[:, :16],
        image(2, 16, 9, 7)[:1].expand(1, 16, 9, 7),
        image(4, 16, 9, 7)[1:3],
    ]
    for x in views:
        y = image(x.shape[0], 48, 5, 4)[:, :24]
        change = {"x": x, "y": y, "saved": None, "weight": image(24, 40, 3, 3)[:, :16]}
        with pytest.raises(ValueError, match=NO_KERNEL):
            _C.fused_conv(**(arguments() | change))
    for x in (torch.ones(3, 16, 1, 1).half(), torch.ones(1, 16, 1, 1).half(), image(3, 64, 1, 1)[:, :16]):
        change = {"x": x, "y": image(x.shape[0], 24, 1, 1), "weight": torch.ones(24, 16, 1, 1).half(), "saved": None}
        with pytest.raises(ValueError, match=NO_KERNEL):
            _C.fused_conv(**(arguments() | change | {"padding": (0, 0)}))


def test_without_a_kernel_the_library_runs():
    x, weight, geometry = image(2, 16, 9, 7), image(24, 16, 3, 3), FusedGeometry(padding=(1, 1))
    some = HAS_KERNELS or triton_conv.is_here()
    why = "the tensors are on cpu, not on a CUDA device" if some else "no Triton"
    assert why in str(fused.why_not_now(x))
    with FakeTensorMode():
        why = "of the class FakeTensor, which may have no memory" if some else "no Triton"
        assert why in str(fused.why_not_now(torch.empty(1, device="cuda")))
    fallback = partial(fused.library_conv, geometry=geometry)
    (y,) = fused.fused_conv(x, weight, (None, None, None), geometry, fallback)
    assert torch.equal(y, torch.nn.functional.conv2d(x, weight, padding=1))


def malformed(choose: random.Random) -> object:
    """Draw something that somebody might pass for a tensor: mostly tensors, slightly wrong."""
    shape = [choose.choice([0, 1, 2, 3, 9, 16, 24]) for _ in range(choose.choice([1, 3, 4, 4, 4, 4]))]
    dtype = choose.choice([torch.float16] * 4 + [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool])
    tensor = torch.zeros(shape, dtype=dtype)
    if len(shape) == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return choose.choice(
        [
            tensor,
            tensor,
            tensor,
            tensor[..., ::2],
            tensor.transpose(0, -1),
            tensor[:, :1] if tensor.dim() > 1 else tensor,
            tensor.expand(2, *shape),
            tensor.numpy() if dtype != torch.bfloat16 else tensor,
            choose.choice([None, 3, "x", [], torch.empty(shape, device="meta")]),
        ]
    )


def fuzz(rounds: int) -> None:
    choose = random.Random(0)
    tensors = ["x", "weight", "scale", "shift", "mask", "y", "saved"]
    pairs = ["stride", "padding", "dilation"]
    names = (*tensors, *pairs, "activation", "candidate")
    for _ in range(rounds):
        given = arguments()
        given |= {name: malformed(choose) for name in choose.sample(tensors, choose.randint(0, 3))}
        sizes = [-(2**63), -1, 0, 1, 2, 3, 1 << 20, 1 << 31, 2**63 - 1]
        given |= {
            name: (choose.choice(sizes), choose.choice(sizes)) for name in choose.sample(pairs, choose.randint(0, 2))
        }
        given["candidate"] = choose.choice([0, 1, 5, -1, 1 << 31, 2**63 - 1])
        with pytest.raises((TypeError, ValueError)) as caught:
            _C.fused_conv(**given)
        assert str(caught.value).startswith(names)
        shapes = {name: given[name] for name in ("x", "weight", "y", "saved", *pairs, "candidate")}
        message = ""
        try:
            workspace = _C.fused_conv_workspace(**shapes)
        except (TypeError, ValueError) as error:
            message = str(error)
        else:
            assert workspace is None or workspace >= 0
        assert message == "" or message.startswith(names)


def test_malformed_arguments_never_crash():
    fuzz(400)


@pytest.mark.slow
def test_many_malformed_arguments_never_crash():
    fuzz(50_000)
