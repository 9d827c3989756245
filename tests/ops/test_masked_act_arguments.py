"""masked_act refuses bad arguments by name, and none crashes it."""

import random

import numpy as np
import pytest
import torch

from fastprune import _C

WHOLE = np.zeros((4, 3, 6), np.float32)


def forward() -> dict[str, object]:
    x = np.arange(-36, 36, dtype=np.float32).reshape(4, 3, 6)
    vectors = {name: np.float32([1, 0.5, 2]) for name in ("scale", "shift", "mask")}
    return {"x": x, **vectors, "activation": "relu", "y": np.empty_like(x), "saved": np.empty_like(x)}


def backward() -> dict[str, object]:
    tensors = {name: np.ones((4, 3, 6), np.float32) for name in ("dy", "saved", "x", "dx")}
    names = ("mask", "scale", "centre", "slope", "offset", "dmask", "dshift", "dscale")
    return {**tensors, **{name: np.ones(3, np.float32) for name in names}, "activation": "relu", "partials": None}


def read_only(shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, np.float32)
    array.flags.writeable = False
    return array


def test_the_kernels_take_numpy_arrays():
    arguments = forward()
    _C.masked_act(**arguments)
    scale, shift, mask = (arguments[name][:, None] for name in ("scale", "shift", "mask"))
    expected = np.maximum(arguments["x"] * scale + shift, 0)
    np.testing.assert_array_equal(arguments["saved"], expected)
    np.testing.assert_array_equal(arguments["y"], expected * mask)
    arguments = backward()
    _C.masked_act_backward(**arguments)
    np.testing.assert_array_equal(arguments["dx"], np.full((4, 3, 6), 2, np.float32))
    np.testing.assert_array_equal(arguments["dmask"], np.full(3, 24, np.float32))
    np.testing.assert_array_equal(arguments["dscale"], np.zeros(3, np.float32))


BOTH = np.zeros((4, 3, 12), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError, "activation: got 'gelu', needs identity, relu, relu6, silu or hardswish"),
        ({"x": np.zeros(6, np.float32)}, ValueError, r"x: got shape \[6\], needs \[N, C\] or \[N, C, \*spatial\]"),
        ({"x": np.zeros((4, 3, 6), np.int32)}, TypeError, "x: got dtype int32, needs dtype float32 or float64 or fl"),
        ({"x": np.zeros((4, 3, 6), np.float16)}, TypeError, "y: got dtype float32, needs dtype float16"),
        ({"y": np.zeros((4, 3, 5), np.float32)}, ValueError, r"y: got shape \[4, 3, 5\], needs shape \[4, 3, 6\] as x"),
        ({"x": np.zeros((4, 3, 12), np.float32)[..., ::2]}, ValueError, r"x: got strides \[36, 12, 2\] for shape"),
        ({"x": np.zeros((4, 3, 6), np.float32)[::-1]}, ValueError, "x: got strides"),
        ({"x": np.broadcast_to(np.float32(1), (4, 3, 6))}, ValueError, "x: got strides"),
        ({"saved": np.zeros((4, 6, 3), np.float32).swapaxes(1, 2)}, ValueError, "saved: got .* in the format of x"),
        ({"scale": np.ones(4, np.float32)}, ValueError, r"scale: got shape \[4\], needs shape \[3\] \(one for each ch"),
        ({"shift": np.ones(3)}, TypeError, "shift: got dtype float64, needs dtype float32"),
        ({"mask": np.ones(6, np.float32)[::2]}, ValueError, "mask: got a strided view, needs contiguous memory"),
        ({"mask": [1.0] * 3}, TypeError, "mask: got an object of type list"),
        ({"y": None, "saved": None}, ValueError, "y: got None, needs a tensor here or in saved"),
        ({"y": read_only((4, 3, 6))}, (TypeError, ValueError), "y: got a.*read-?only"),
        ({"x": WHOLE, "y": WHOLE, "saved": WHOLE}, ValueError, "saved: got memory that overlaps y, needs memory of it"),
        ({"x": BOTH[..., :6]}, ValueError, "x: got strides"),
        ({"x": BOTH.reshape(-1)[:72].reshape(4, 3, 6), "y": BOTH.reshape(-1)[6:78].reshape(4, 3, 6)},
         ValueError, "y: got memory that overlaps x, needs memory of its own or exactly the same"),
        ({"residual": np.zeros((4, 3, 5), np.float32)}, ValueError, r"residual: got shape \[4, 3, 5\], needs shape"),
        ({"residual": WHOLE, "y": WHOLE}, ValueError, "y: got memory that overlaps residual"),
        ({"y": WHOLE, "mask": WHOLE.reshape(-1)[:3]}, ValueError, "y: got memory that overlaps mask"),
        ({"x": np.zeros(289, np.int8)[1:].view(np.float32).reshape(4, 3, 6)}, ValueError, "x: got unaligned memory"),
        ({"x": torch.empty(4, 3, 6, device="meta")}, TypeError, "x: got a Tensor that does not lend its memory"),
        ({"x": torch.zeros(4, 3, 6, dtype=torch.complex64).conj().imag}, TypeError, "x: got a tensor with the neg"),
    ],
)  # fmt: skip
def test_forward_refuses(emulated, change, error, message):
    arguments = forward() | change
    before = {name: np.array(value) for name, value in arguments.items() if isinstance(value, np.ndarray)}
    for kernel in (_C.masked_act, emulated.masked_act):
        with pytest.raises(error, match=message):
            kernel(**arguments)
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict.fromkeys(("dx", "dmask", "dshift", "dscale")), ValueError, "dx: got None, needs a tensor here or in dm"),
        ({"offset": None}, ValueError, "offset: got None, needs a vector beside slope"),
        ({"slope": None}, ValueError, "slope: got None, needs a vector beside offset"),
        ({"x": None}, ValueError, "x: got None, needs a tensor for dscale"),
        ({"x": None, "dscale": None}, ValueError, "x: got None, needs a tensor for slope"),
        ({"dmask": np.ones(2, np.float32)}, ValueError, r"dmask: got shape \[2\], needs shape \[3\]"),
        ({"dmask": np.ones(3)}, TypeError, "dmask: got dtype float64, needs dtype float32"),
        ({"dmask": read_only((3,))}, (TypeError, ValueError), "dmask: got a.*read-?only"),
        ({"saved": np.ones((4, 3, 7), np.float32)}, ValueError, r"saved: got shape .* needs shape \[4, 3, 6\] as dy"),
        ({"dx": np.ones((4, 6, 3), np.float32).swapaxes(1, 2)}, ValueError, "dx: got strides .* in the format of dy"),
        ({"others": WHOLE}, ValueError, "others: got a tensor, needs None beside dshift, dscale and slope"),
        ({"activation": ""}, ValueError, "activation: got ''"),
    ],
)
def test_backward_refuses(change, error, message):
    with pytest.raises(error, match=message):
        _C.masked_act_backward(**(backward() | change))


def test_sums_share_no_memory():
    vectors = np.ones(5, np.float32)
    with pytest.raises(ValueError, match="dshift: got memory that overlaps dmask"):
        _C.masked_act_backward(**(backward() | {"dmask": vectors[:3], "dshift": vectors[2:]}))
    with pytest.raises(ValueError, match="dmask: got memory that overlaps mask"):
        _C.masked_act_backward(**(backward() | {"mask": vectors[:3], "dmask": vectors[:3]}))
    with pytest.raises(ValueError, match="dx: got memory that overlaps dmask"):
        _C.masked_act_backward(**(backward() | {"dx": WHOLE, "dmask": WHOLE.reshape(-1)[:3]}))


def malformed(choose: random.Random) -> object:
    """Draw something that somebody might pass: mostly tensors, slightly wrong."""
    shape = choose.choice([(4, 3, 6), (4, 3, 6), (3,), (3,), (4, 3), (4, 3, 2, 3), (0, 3, 6), (4, 0, 6), (), (1,) * 9])
    dtype = choose.choice([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
    tensor = torch.randint(-3, 9, shape).to(dtype)
    return choose.choice(
        [
            tensor,
            tensor,
            tensor.mT.contiguous().mT if len(shape) > 1 else tensor,
            tensor.repeat(2, *[1] * (len(shape) - 1))[::2] if shape else tensor,
            tensor.repeat(*[1] * (len(shape) - 1), 2)[..., :3] if shape else tensor,
            torch.zeros(()).expand(shape),
            tensor.numpy() if dtype != torch.bfloat16 else tensor,
            torch.full(shape, choose.choice([torch.nan, torch.inf, -1.0, 1e38])),
            choose.choice([None, 3, "x", "silu", []]),
        ]
    )


def fuzz(rounds: int) -> None:
    choose = random.Random(0)
    torch.manual_seed(0)
    messages: list[str] = []
    names = (*forward(), *backward())
    for _ in range(rounds):
        for good, kernel in ((forward(), _C.masked_act), (backward(), _C.masked_act_backward)):
            changed = {name: malformed(choose) for name in choose.sample(list(good), choose.randint(1, 3))}
            try:
                kernel(**(good | changed))
            except (TypeError, ValueError) as error:
                messages.append(str(error))
    assert rounds / 2 < len(messages) < 2 * rounds
    # pybind11 itself refuses an activation that is no string.
    assert all(message.startswith(names) or "incompatible function arguments" in message for message in messages)


def test_malformed_arguments_never_crash():
    fuzz(400)


@pytest.mark.slow
def test_many_malformed_arguments_never_crash():
    fuzz(50_000)
