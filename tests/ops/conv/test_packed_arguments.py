"""The CPU convolution refuses bad arguments by name, and none crashes it."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

from fastprune import _C, ops
from fastprune.ops.conv import packed as masked_conv
from fastprune.ops.conv.frozen import FrozenConv
from fastprune.ops.conv.library import Geometry
from fastprune.ops.layout import has_rows

INSTRUCTIONS = _C.masked_conv_instructions()
INF = float("inf")

pytestmark = pytest.mark.skipif(not INSTRUCTIONS, reason="the kernels are not written for this processor")


def pixels(*size: int, pitch: int | None = None) -> torch.Tensor:
    batch, channels, height, width = size
    pitch = pitch or channels
    return torch.zeros(batch, height, width, pitch).permute(0, 3, 1, 2)[:, :channels]


def good(algorithm: str = "direct") -> dict[str, object]:
    """Return the arguments of a call that succeeds: 3 of 4 channels of x, 5 of 6 rows, 3x3, 8x7 pixels."""
    instructions = INSTRUCTIONS[0]
    packed = torch.zeros(_C.masked_conv_packed_size(algorithm, instructions, (6, 4, 3, 3)))
    return {
        "algorithm": algorithm, "instructions": instructions, "x": pixels(2, 3, 8, 7), "packed": packed,
        "weight_size": (6, 4, 3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "shift": torch.zeros(5),
        "mask": torch.ones(5), "residual": pixels(2, 5, 8, 7), "lowest": 0.0, "highest": 6.0, "y": pixels(2, 5, 8, 7),
        "saved": pixels(2, 5, 8, 7), "num_threads": 1,
    }  # fmt: skip


def good_depthwise() -> dict[str, object]:
    """Return the arguments of a depthwise call that succeeds: 3 channels of x, 5 of 6 rows, 3x3, 8x7 pixels."""
    size = (6, 1, 3, 3)
    packed = torch.zeros(_C.masked_conv_packed_size("depthwise", INSTRUCTIONS[0], size))
    return good() | {"algorithm": "depthwise", "packed": packed, "weight_size": size}


def good_backward() -> dict[str, object]:
    """Return the same for the backward pass, with the epilogue of what the convolution reads."""
    return good() | {"shift": None, "saved": None, "previous": pixels(2, 5, 8, 7), "dmask": torch.zeros(5)}


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


WIDE = pixels(2, 16, 8, 7)
VECTOR = torch.zeros(6000)
REFUSALS = [
    ({"algorithm": "fft"}, "algorithm: got 'fft', needs direct, winograd or depthwise"),
    ({"instructions": "sse2"}, "instructions: got 'sse2', needs avx2 or avx512"),
    ({"algorithm": "winograd", "stride": (1, 2)}, "algorithm: got 'winograd', needs 'direct' for all but 3x3 kernels"),
    ({"algorithm": "winograd", "dilation": (2, 1)}, "algorithm: got 'winograd', needs 'direct'"),
    ({"algorithm": "winograd", "weight_size": (6, 4, 3, 1)}, "algorithm: got 'winograd', needs 'direct'"),
    ({"algorithm": "winograd"}, r"packed: got shape \[\d+\], needs shape \[\d+\] \(masked_conv_packed_size of"),
    ({"algorithm": "depthwise"}, r"algorithm: got 'depthwise', needs 'direct' for all but \[K, 1, R, S\] weights"),
    ({"algorithm": "depthwise", "weight_size": (6, 1, 43, 3)}, "algorithm: got 'depthwise', .* up to 128 taps"),
    ({"stride": (0, 1)}, r"stride: got 0, needs integers in \[1, 2147483647\]"),
    ({"stride": (1, 2**31)}, "stride: got 2147483648, needs integers"),
    ({"padding": (-1, 0)}, r"padding: got -1, needs integers in \[0, 2147483647\]"),
    ({"padding": (0, 3)}, "padding: got 3, needs less than 3, what the dilated kernel spans"),
    ({"padding": (0, 2**63 - 1)}, "padding: got 9223372036854775807, needs integers"),
    ({"dilation": (1, -3)}, "dilation: got -3, needs integers"),
    ({"weight_size": (6, 4, 3, 0)}, r"weight_size: got 0 as one of its sizes, needs sizes of at least 1"),
    ({"weight_size": (2**16, 2**15, 1, 1)}, r"weight_size: got 32768 as one .* product below 2\^31"),
    ({"weight_size": (2**62, 2**62, 2**62, 2**62)}, "weight_size: got 4611686018427387904 as one"),
    ({"weight_size": (7, 4, 3, 3), "packed": VECTOR[:-1]}, r"packed: got shape \[5999\], needs shape \["),
    ({"packed": VECTOR.double()}, "packed: got dtype float64, needs dtype float32"),
    ({"packed": None}, "packed: got an object of type NoneType"),
    ({"x": pixels(2, 3, 8, 7).double()}, "x: got dtype float64, needs dtype float32"),
    ({"x": torch.zeros(2, 3, 8)}, "x: got 3 dimensions, needs four"),
    ({"x": torch.zeros(2, 3, 8, 7)}, "x: got other strides, needs channels_last memory"),
    ({"x": WIDE[:, :6:2]}, "x: got other strides"),
    ({"x": pixels(2, 3, 8, 9)[..., :7]}, "x: got other strides"),
    ({"x": pixels(1, 3, 8, 7).expand(2, -1, -1, -1)}, "x: got other strides"),
    ({"x": pixels(2, 5, 8, 7)}, "x: got 5 channels, needs 1 to 4"),
    ({"x": pixels(2, 0, 8, 7)}, "x: got 0 channels, needs 1 to 4"),
    ({"x": pixels(2, 3, 8, 6)}, "residual: got size 7 in dimension 3, needs 6"),
    ({"x": pixels(1, 3, 8, 7), "residual": None}, "y: got size 2 in dimension 0, needs 1"),
    ({"x": [1.0]}, "x: got an object of type list"),
    ({"x": torch.empty(2, 3, 8, 7, device="meta")}, "x: got a Tensor that does not lend its memory"),
    ({"y": None, "saved": None}, "y: got None, needs a tensor unless saved is one"),
    ({"y": pixels(2, 7, 8, 7)}, "y: got 7 channels, needs 1 to 6"),
    ({"y": pixels(2, 4, 8, 7)}, r"shift: got shape \[5\], needs shape \[4\] \(one for each channel of the result\)"),
    ({"y": torch.zeros(5)}, "y: got 1 dimensions, needs four"),
    ({"y": None, "saved": torch.zeros(5)}, "saved: got 1 dimensions, needs four"),
    ({"y": torch.zeros(2, 5, 8, 7)}, "y: got other strides"),
    ({"y": pixels(2, 5, 8, 7).half()}, "y: got dtype float16"),
    ({"y": frozen(np.zeros((2, 8, 7, 5), np.float32)).transpose(0, 3, 1, 2)}, "y: got a.*read-?only"),
    ({"saved": pixels(2, 5, 7, 7)}, "saved: got size 7 in dimension 2, needs 8"),
    ({"residual": pixels(2, 4, 8, 7)}, "residual: got size 4 in dimension 1, needs 5"),
    ({"residual": torch.zeros(2, 5, 8, 7)}, "residual: got other strides"),
    ({"shift": torch.zeros(4)}, r"shift: got shape \[4\], needs shape \[5\]"),
    ({"shift": torch.zeros(5).double()}, "shift: got dtype float64"),
    ({"mask": torch.ones(10)[::2]}, "mask: got a strided view, needs contiguous memory"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, "mask: got dtype bool"),
    ({"x": WIDE[:, 8:11], "y": WIDE[:, :5]}, "y: got memory that overlaps x, needs memory of its own"),
    ({"x": WIDE[:, 8:11], "saved": WIDE[:, :5]}, "saved: got memory that overlaps x"),
    ({"residual": WIDE[:, 8:13], "y": WIDE[:, :5]}, "y: got memory that overlaps residual"),
    ({"saved": WIDE[:, 8:13], "y": WIDE[:, :5]}, "saved: got memory that overlaps y"),
    ({"shift": WIDE.permute(0, 2, 3, 1).flatten()[20:25], "y": WIDE[:, :5]}, "y: got memory that overlaps shift"),
    ({"mask": WIDE.permute(0, 2, 3, 1).flatten()[20:25], "y": WIDE[:, :5]}, "y: got memory that overlaps mask"),
    ({"lowest": 1.0, "highest": 0.5}, "lowest: got 1.0+, needs at most highest, 0.5"),
    ({"highest": float("nan")}, "lowest: got 0.0+, needs at most highest, nan"),
    ({"num_threads": 2**31 - 1}, "num_threads: got 2147483647, needs at most 1024"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refusals(change, message):
    arguments = good() | change
    written = [torch.from_numpy(a) if isinstance(a, np.ndarray) and a.flags.writeable else a
               for a in (arguments["y"], arguments["saved"])]  # fmt: skip
    before = [tensor.clone() for tensor in written if isinstance(tensor, torch.Tensor)]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        _C.masked_conv(**arguments)
    after = [tensor for tensor in written if isinstance(tensor, torch.Tensor)]
    assert all(map(torch.equal, before, after))


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["x", "packed", "shift", "mask", "residual", "y", "saved", "previous", "dmask"])
def test_a_tensor_that_lends_no_memory_is_refused(name):
    """Torch fails to lend a quantized tensor after it has written half of the description."""
    arguments = good_backward() if name in ("previous", "dmask") else good()
    quantized = torch.quantize_per_tensor(torch.zeros(2, 5, 8, 7), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match=f"^{name}: got a Tensor that does not lend its memory"):
        _C.masked_conv(**(arguments | {name: quantized} | ({"y": None} if name == "saved" else {})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": torch.zeros(5)}, "shift: got a tensor beside previous, needs None"),
        ({"saved": pixels(2, 5, 8, 7)}, "saved: got a tensor beside previous, needs None"),
        ({"previous": None}, "dmask: got a tensor without previous, needs None"),
        ({"previous": pixels(2, 5, 7, 7)}, "previous: got size 7 in dimension 2, needs 8"),
        ({"previous": torch.zeros(2, 5, 8, 7)}, "previous: got other strides"),
        ({"previous": WIDE[:, 4:9], "y": WIDE[:, :5]}, "y: got memory that overlaps previous"),
        ({"dmask": torch.zeros(4)}, r"dmask: got shape \[4\], needs shape \[5\]"),
        ({"dmask": torch.zeros(5).double()}, "dmask: got dtype float64"),
        ({"dmask": frozen(np.zeros(5, np.float32))}, "dmask: got a.*read-?only"),
        ({"dmask": VECTOR[:5], "mask": VECTOR[4:9]}, "dmask: got memory that overlaps mask"),
        ({"dmask": VECTOR[:5], "y": VECTOR[4:564].view(2, 8, 7, 5).permute(0, 3, 1, 2)}, "dmask: .* overlaps y"),
    ],
)
def test_refusals_of_the_backward_epilogue(change, message):
    arguments = good_backward() | change
    before = arguments["y"].clone()
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        _C.masked_conv(**arguments)
    assert torch.equal(arguments["y"], before)


WEIGHT = torch.zeros(6, 4, 3, 3)


def pack_arguments() -> dict[str, object]:
    length = _C.masked_conv_packed_size("direct", INSTRUCTIONS[0], (6, 4, 3, 3))
    return {
        "algorithm": "direct", "instructions": INSTRUCTIONS[0], "weight": WEIGHT, "scale": torch.ones(6),
        "transposed": False, "packed": torch.zeros(length), "num_threads": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": ""}, "algorithm: got '', needs direct, winograd or depthwise"),
        ({"instructions": "avx"}, "instructions: got 'avx', needs avx2 or avx512"),
        ({"weight": WEIGHT.double()}, "weight: got dtype float64"),
        ({"weight": WEIGHT[0]}, "weight: got 3 dimensions, needs four"),
        ({"weight": WEIGHT[:, :0]}, "weight: got 0 as one of its sizes"),
        ({"weight": torch.zeros(1).expand(2**16, 2**16, 1, 1)}, "weight: got 65536 as one of its sizes"),
        ({"weight": WEIGHT[..., :1], "algorithm": "winograd"}, "algorithm: got 'winograd', needs 'direct'"),
        ({"packed": torch.zeros(7)}, r"packed: got shape \[7\], needs shape \[\d+\]"),
        ({"packed": frozen(pack_arguments()["packed"].numpy()) if INSTRUCTIONS else None}, "packed: got a.*read-?only"),
        ({"scale": torch.ones(5)}, r"scale: got shape \[5\], needs shape \[6\] \(one for each row of the weight\)"),
        ({"scale": torch.ones(6), "transposed": True}, "scale: got one for a transposed weight, needs None"),
        ({"num_threads": 1025}, "num_threads: got 1025, needs at most 1024"),
    ],
)
def test_packing_refuses(change, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        _C.masked_conv_pack(**(pack_arguments() | change))


@pytest.mark.parametrize("flipped", [False, True])
def test_a_weight_packed_onto_itself_is_refused(flipped):
    arguments = pack_arguments()
    memory = np.zeros(arguments["packed"].numel() + 100, np.float32)
    weight = memory[:216].reshape(6, 4, 3, 3)
    weight = weight[::-1, :, :, ::-1] if flipped else weight
    with pytest.raises(ValueError, match="packed: got memory that overlaps weight"):
        _C.masked_conv_pack(**(arguments | {"weight": weight, "packed": memory[100:]}))
    scale = memory[:6]
    with pytest.raises(ValueError, match="packed: got memory that overlaps scale"):
        _C.masked_conv_pack(**(arguments | {"scale": scale, "packed": memory[:-100]}))


@pytest.mark.parametrize("size", [(0, 1, 1, 1), (2**31, 1, 1, 1), (2**30, 2, 1, 1), (-1, -1, 1, 1)])
def test_a_size_that_cannot_be_packed_is_refused(size):
    with pytest.raises(ValueError, match=r"weight_size: got -?[0-9]+ as one of its sizes"):
        _C.masked_conv_packed_size("direct", INSTRUCTIONS[0], size)


def test_the_kernel_takes_numpy_arrays():
    random_ = np.random.default_rng(0)
    weight, x = random_.normal(size=(5, 3, 2, 2)).astype("f"), random_.normal(size=(1, 6, 7, 3)).astype("f")
    packed = np.empty(_C.masked_conv_packed_size("direct", INSTRUCTIONS[0], weight.shape), np.float32)
    _C.masked_conv_pack("direct", INSTRUCTIONS[0], weight, None, False, packed)
    y = np.zeros((1, 5, 6, 5), np.float32)
    _C.masked_conv(
        "direct", INSTRUCTIONS[0], x.transpose(0, 3, 1, 2), packed, weight.shape, (1, 1), (0, 0), (1, 1), None, None,
        None, -INF, INF, y.transpose(0, 3, 1, 2), None,
    )  # fmt: skip
    expected = torch.nn.functional.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(weight))
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), expected, rtol=1e-5, atol=1e-5)


def test_without_a_result_nothing_is_computed():
    for size in ((0, 8, 7), (2, 0, 7), (2, 8, 0)):
        batch, height, width = size
        memory = {name: torch.full((1000,), -7.0) for name in ("y", "saved")}
        empty = {n: m.as_strided((batch, 5, height, width), (280, 1, 35, 5)) for n, m in memory.items()}
        empty |= {"x": pixels(batch, 3, height, width), "residual": pixels(batch, 5, height, width)}
        _C.masked_conv(**(good() | empty))
        assert all((untouched == -7).all() for untouched in memory.values())


@pytest.mark.parametrize(("size", "out"), [((0, 3), (2, 5)), ((3, 0), (5, 2)), ((0, 0), (2, 2))])
@pytest.mark.parametrize("algorithm", ["direct", "winograd", "depthwise"])
def test_an_empty_image_is_padding_only(algorithm, size, out):
    """There is no pixel, but two of padding on each side: the outputs are sums of zeros."""
    arguments = good_depthwise() if algorithm == "depthwise" else good(algorithm)
    arguments |= {"x": pixels(2, 3, *size), "padding": (2, 2), "shift": torch.arange(5.0)}
    arguments |= {name: pixels(2, 5, *out) for name in ("y", "saved", "residual")}
    _C.masked_conv(**arguments)
    assert torch.equal(arguments["y"], torch.arange(5.0).view(-1, 1, 1).expand(2, 5, *out))


@pytest.mark.parametrize("far", [2**19, 2**25, 2**30])
def test_a_call_that_no_memory_can_hold_raises(far):
    """A task would copy lines, with their margins, of up to 2^62 pixels."""
    one = {name: pixels(2, 5, 1, 1) for name in ("y", "saved", "residual")}
    with pytest.raises(MemoryError):
        _C.masked_conv(**(good() | one | {"x": pixels(2, 3, 1, 1), "padding": (far, far), "dilation": (far, far)}))


def test_views_of_some_pixels_are_copied():
    whole = torch.randn(3, 8, 9, 11, generator=torch.Generator().manual_seed(0))
    whole = whole.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    views = whole[..., :7], whole[:, :, ::2], whole[:, :, 2:-2, 1:], whole[:1].expand(3, -1, -1, -1), whole[::2]
    for x in views:
        expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
        torch.testing.assert_close(ops.masked_conv_bn_act(x, weight, None, padding=1, activation="identity"),
                                   expected.float(), rtol=1e-5, atol=1e-5)  # fmt: skip
        assert not has_rows(x)
    assert all(has_rows(x) for x in (whole, whole[:, 2:5], whole[:1, :3], whole[1:, :, :, :]))  # read in place


@pytest.mark.parametrize("groups", [1, 2])
def test_the_gradient_of_an_input_that_lacks_channels_lacks_them_too(groups):
    weight = torch.randn(6, 8 // groups, 3, 3, generator=torch.Generator().manual_seed(1))
    conv = FrozenConv(weight, padding=1, groups=groups, activation="identity")
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(2)).to(memory_format=torch.channels_last)
    x[:, 3:] = 0
    x.requires_grad_()
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0])
    (expected,) = torch.autograd.grad(conv(x, mask, open_out=4).square().sum(), x)
    narrow = x.detach()[:, :3].clone(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(conv(narrow, mask, open_in=3, open_out=4).square().sum(), narrow)
    torch.testing.assert_close(gradient, expected[:, :3])


def test_a_limit_of_the_instruction_set_holds_for_convolutions():
    widest, weight = _C.instruction_set(), torch.zeros(4, 4, 3, 3)
    x = torch.zeros(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    before = masked_conv.pack(weight, Geometry())
    try:
        assert _C.limit_instruction_set("avx2")
        assert _C.masked_conv_instructions() == ["avx2"]
        assert masked_conv.pack(weight, Geometry()).instructions == "avx2"
        assert _C.limit_instruction_set("baseline")
        assert _C.masked_conv_instructions() == []
        assert not masked_conv.computes(x, weight, Geometry())
        with pytest.raises(ValueError, match="instructions: got a processor without AVX2 and FMA"):
            masked_conv.pack(weight, Geometry())
        masked_conv.convolve(x, before, 4)  # an earlier packed weight stays usable
    finally:
        assert _C.limit_instruction_set(widest)
    assert masked_conv.computes(x, weight, Geometry())


def malformed(choose: random.Random, value: object) -> object:
    """Draw something that somebody might pass in place of this value: mostly tensors, slightly wrong."""
    odd = choose.choice([None, 3, "x", [], (1, 1), torch.zeros(()), torch.empty(0), np.zeros(4, np.int8)])
    if isinstance(value, str):
        return choose.choice(["direct", "winograd", "depthwise", "avx2", "avx512", "", odd])
    if isinstance(value, tuple):
        numbers = [0, 1, 2, 3, 5, -1, 2**31 - 1, 2**31, 2**62, -(2**63)]
        return choose.choice([tuple(choose.choice(numbers) for _ in value), odd])
    if not isinstance(value, torch.Tensor):
        return choose.choice([0, 1, 2, -1, 1024, 5000, 0.5, INF, -INF, float("nan"), odd])
    if value.dim() == 1:
        lengths = [0, 1, 4, 5, 6, value.numel() - 1, value.numel(), 2 * value.numel()]
        vector = torch.zeros(choose.choice(lengths))
        return choose.choice([vector, vector[::2], vector.double(), vector.numpy(), vector.view(1, -1), odd])
    size = [choose.choice([0, 1, 2, 3, 5, 7, 8]) if choose.random() < 0.3 else side for side in value.shape]
    tensor = pixels(*size, pitch=choose.choice([None, 8, 9]))
    return choose.choice(
        [
            tensor,
            tensor,
            value[:, : choose.randint(0, 5)],
            tensor.contiguous(),
            tensor[..., ::2],
            tensor.flip(2).numpy()[:, :, ::-1],
            tensor.double(),
            tensor.numpy(),
            pixels(*size[:3], 1).expand(size),
            WIDE[:, 3 : 3 + choose.randint(0, 5)],
            tensor.requires_grad_(),
            odd,
        ]
    )


def refusals(rounds: int) -> tuple[list[str], int]:
    """Return the messages of refused calls, and how many calls were accepted."""
    choose = random.Random(0)
    errors, accepted = [], 0
    calls = [(_C.masked_conv, good("direct")), (_C.masked_conv, good("winograd"))]
    calls += [
        (_C.masked_conv, good_depthwise()),
        (_C.masked_conv, good_backward()),
        (_C.masked_conv_pack, pack_arguments()),
    ]
    for round_ in range(rounds):
        kernel, arguments = calls[round_ % len(calls)]
        # Clones keep the strides; a call may overwrite them.
        arguments = {name: value.clone() if isinstance(value, torch.Tensor) else value
                     for name, value in arguments.items()}  # fmt: skip
        changed = choose.sample(list(arguments), choose.randint(1, 3))
        arguments |= {name: malformed(choose, arguments[name]) for name in changed}
        try:
            kernel(**arguments)
            accepted += 1
        except MemoryError:
            pass  # the taps are so far apart that no memory holds the pixels between them
        except (TypeError, ValueError) as error:
            errors.append(str(error))
    return errors, accepted


def check_refusals(rounds: int) -> None:
    errors, accepted = refusals(rounds)
    assert rounds / 2 < len(errors) < rounds
    assert accepted > rounds / 100
    ours = [error for error in errors if error and "incompatible function arguments" not in error]
    shape = re.compile(r"(\w+): got .+, needs .+", re.DOTALL)
    assert [error for error in ours if not shape.fullmatch(error)] == []
    named = {error.split(":")[0] for error in ours}
    assert named >= (good_backward().keys() | pack_arguments().keys()) - {"highest", "transposed"}


def test_malformed_arguments_never_crash():
    check_refusals(1500)


@pytest.mark.slow
def test_many_malformed_arguments_never_crash():
    check_refusals(100_000)
