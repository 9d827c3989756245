"""masked_conv_bn_act refuses bad arguments by name, and none crashes it."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from fastprune import ops


def good() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 4, 5, 5),
        "weight": torch.randn(6, 4, 3, 3),
        "bn": (torch.ones(6), torch.zeros(6), torch.zeros(6), torch.ones(6)),
        "mask": torch.ones(6),
    }


def statistics(place: int, value: object) -> tuple[object, ...]:
    return tuple(value if i == place else tensor for i, tensor in enumerate(good()["bn"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, 5, 5)}, r"x: got shape \[4, 5, 5\], needs \[N, C, H, W\]"),
        ({"x": torch.randn(2, 3, 5, 5)}, r"x: got 3 channels, needs 4: 4 columns of weight in 1 group"),
        ({"x": torch.randn(2, 4, 2, 5)}, r"x: got 2 x 5 pixels, needs at least"),
        ({"x": torch.randn(2, 4, 5, 5, device="meta")}, "weight: got a tensor on cpu, needs one on meta, where x is"),
        ({"weight": torch.randn(6, 4)}, r"weight: got shape \[6, 4\], needs \[K, C / groups, R, S\]"),
        ({"weight": torch.randn(0, 4, 3, 3)}, r"weight: got shape \[0, 4, 3, 3\]"),
        ({"groups": 4}, r"groups: got 4, needs a divisor of the 6 rows"),
        ({"groups": 0}, r"groups: got 0, needs an integer >= 1"),
        ({"groups": 2}, r"x: got 4 channels, needs 8"),
        ({"mask": torch.ones(5)}, r"mask: got shape \[5\], needs \[6\]"),
        ({"mask": torch.ones(6, 1)}, r"mask: got shape \[6, 1\], needs \[6\]"),
        ({"bias": torch.ones(1)}, r"bias: got shape \[1\], needs \[6\]"),
        ({"residual": torch.ones(2, 6, 5, 5)}, r"residual: got shape \[2, 6, 5, 5\], needs \[2, 6, 3, 3\]"),
        ({"bn": statistics(2, torch.ones(4))}, r"bn\[2\]: got shape \[4\], needs \[6\]"),
        ({"bn": statistics(3, None)}, r"bn: got no running statistics"),
        ({"bn": good()["bn"][:3]}, r"bn: needs \(weight, bias, running_mean, running_var\)"),
        ({"bn": torch.ones(4, 6)}, r"bn: needs \(weight, bias, running_mean, running_var\)"),
        ({"activation": "gelu"}, "activation: got 'gelu', needs one of identity, relu, relu6, silu, hardswish"),
        ({"eps": -1.0}, "eps: got -1.0, needs a number >= 0"),
        ({"eps": float("nan")}, "eps: got nan"),
        ({"stride": 0}, r"stride: got 0, needs an integer >= 1 and below 2\^31, or two of them"),
        ({"stride": (1, 2, 3)}, r"stride: got \(1, 2, 3\)"),
        ({"stride": 1.5}, "stride: got 1.5"),
        ({"padding": -1}, "padding: got -1, needs an integer >= 0"),
        ({"padding": 2**40}, "padding: got 1099511627776, needs an integer >= 0 and below"),
        ({"padding": "same"}, "padding: got 'same'"),
        ({"dilation": (1, 0)}, r"dilation: got \(1, 0\)"),
        ({"open_in": 5}, "open_in: got 5, needs a count of channels from 0 to 4"),
        ({"open_out": -1}, "open_out: got -1, needs a count of channels from 0 to 6"),
        ({"open_out": 2.0}, "open_out: got 2.0"),
        ({"open_out": True}, "open_out: got True"),
    ],
)
def test_wrong_values(change, message):
    with pytest.raises(ValueError, match=message):
        ops.masked_conv_bn_act(**(good() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4, 5, 5, dtype=torch.int64)}, "x: got dtype int64, needs one of float32, float64"),
        ({"x": np.ones((2, 4, 5, 5), np.float32)}, "x: got an object of type ndarray, needs a tensor"),
        ({"x": None}, "x: got an object of type NoneType"),
        ({"x": torch.ones(2, 4, 5, 5).to_sparse()}, "x: got a tensor of layout torch.sparse_coo, needs a dense one"),
        ({"weight": torch.ones(6, 4, 3, 3).double()}, "weight: got dtype float64, needs float32, that of x"),
        ({"weight": None}, "weight: got an object of type NoneType"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, "mask: got dtype bool, needs float32"),
        ({"mask": torch.ones(6).double()}, "mask: got dtype float64, needs float32"),
        ({"bn": statistics(0, torch.ones(6).half())}, r"bn\[0\]: got dtype float16, needs float32"),
        ({"residual": torch.ones(2, 6, 3, 3).half()}, "residual: got dtype float16, needs float32, that of x"),
        ({"residual": 3.0}, "residual: got an object of type float"),
    ],
)
def test_wrong_types(change, message):
    with pytest.raises(TypeError, match=message):
        ops.masked_conv_bn_act(**(good() | change))


def malformed(choose: random.Random) -> object:
    size = [choose.choice([0, 1, 2, 3, 4, 5, 6]) for _ in range(choose.randint(0, 5))]
    dtype = choose.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool])
    tensor = torch.zeros(size, dtype=dtype)
    return choose.choice(
        [
            tensor,
            tensor.transpose(0, -1) if size else tensor,
            tensor.expand(2, *size),
            tensor.to_sparse() if size and dtype == torch.float32 else tensor,
            torch.zeros(6, dtype=dtype),
            torch.zeros(2, 4, 5, 5, dtype=dtype)[:, ::2],
            (tensor, tensor, tensor, tensor),
            choose.choice([None, 0, 1, 2, 3, 7, -1, 2**40, 1.5, "x", "relu", (1, 2), [], float("nan"), True]),
        ]
    )


def fuzz(rounds: int) -> tuple[int, int]:
    """Return how many calls were refused, and how many computed something."""
    choose = random.Random(0)
    geometry = ("stride", "padding", "dilation", "groups", "activation", "open_in", "open_out")
    names = (*good(), "bias", "residual", *geometry)
    messages: list[str] = []
    for _ in range(rounds):
        changes = {name: malformed(choose) for name in choose.sample(names, choose.randint(1, 2))}
        try:
            y = ops.masked_conv_bn_act(**(good() | changes))
        except (TypeError, ValueError) as error:
            messages.append(str(error))
        else:
            assert y.dim() == 4, changes
    assert all(message.startswith(names) for message in messages)
    return len(messages), rounds - len(messages)


def test_malformed_arguments_never_crash():
    refused, computed = fuzz(1000)
    assert refused > 500
    assert computed > 20


@pytest.mark.slow
def test_many_malformed_arguments_never_crash():
    refused, computed = fuzz(100_000)
    assert refused > 50_000
    assert computed > 1_000
