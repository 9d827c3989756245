"""Whichever kernel computes a convolution, the result is the same, NaN included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastprune import ops, reference
from fastprune.ops.activations import ACTIVATIONS
from fastprune.ops.conv import route
from fastprune.ops.conv.frozen import FrozenConv
from fastprune.ops.conv.library import Geometry
from fastprune.ops.conv.open_channels import ConvLayer

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PLACES = {  # the tensor that holds a NaN, and the index
    "x": (0, 1, 2, 2),
    "weight": 2,
    "bias": 3,
    "beta": 3,
    "residual": (1, 2, 3, 3),
}
LAYERS = {  # x, weight, options; too few channels for Winograd, which would spread a NaN
    "1x1": ((2, 6, 5, 5), (8, 6, 1, 1), {}),
    "3x3": ((2, 6, 5, 5), (8, 6, 3, 3), {"padding": 1}),
    "depthwise": ((2, 8, 5, 5), (8, 1, 3, 3), {"padding": 1, "groups": 8}),
    "matrix product": ((2, 80, 4, 4), (256, 80, 1, 1), {}),  # more than 512 weights for each pixel
}


def make_tensors(layer: str, dtype: torch.dtype, layout: torch.memory_format, device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    size, weight_size, _ = LAYERS[layer]
    outputs, vectors = weight_size[0], torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "x": torch.randn(size).to(dtype).to(memory_format=layout),
        "weight": torch.randn(weight_size).to(dtype),
        "residual": torch.randn(size[0], outputs, *size[2:]).to(dtype).to(memory_format=layout),
        **{name: torch.randn(outputs, dtype=vectors) for name in ("bias", "beta", "mean")},
        "variance": torch.rand(outputs, dtype=vectors) + 0.5,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def compute_results(
    tensors: dict[str, Tensor], mask: Tensor | None, residual: Tensor | None, options: dict[str, object]
) -> list[tuple[Tensor, Tensor]]:
    """Return results of the operator and of FrozenConv, with and without gradients, each with the reference's."""
    bn = (None, *(tensors[name] for name in ("beta", "mean", "variance")))
    weight, bias = tensors["weight"], tensors["bias"]
    frozen = FrozenConv(weight, bn, bias=bias, **options)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: ops.masked_conv_bn_act(x, weight, bn, mask, bias=bias, residual=residual, **options),
        lambda x: frozen(x, mask, residual=residual),
    ]
    x = tensors["x"]
    expected = reference.masked_conv_bn_act(x, weight, bn, mask, bias=bias, residual=residual, **options)
    return [(f(x.clone().requires_grad_(grad)), expected) for f in functions for grad in (False, True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_goes_through(activation, dtype, layout, layer, device):
    options = {"activation": activation, **LAYERS[layer][2]}
    for name, index in PLACES.items():
        tensors = make_tensors(layer, dtype, layout, device)
        tensors[name][index] = torch.nan
        outputs = tensors["bias"].numel()
        masks = [None, (torch.arange(outputs) % 2).to(tensors["bias"]), torch.rand(outputs).to(tensors["bias"])]
        residual = tensors["residual"] if name == "residual" else None
        for mask in masks:
            for got, expected in compute_results(tensors, mask, residual, options):
                assert expected.isnan().any()
                assert torch.equal(got.isnan(), expected.isnan()), name


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_a_fused_kernel_two_passes_give_the_same(activation, saves, adds):
    torch.manual_seed(0)
    residual = torch.randn(2, 8, 5, 5) if adds else None
    x, scale, shift, mask = torch.randn(2, 6, 5, 5), *torch.rand(3, 8)
    layer = ConvLayer(torch.randn(8, 6, 3, 3), scale, shift, Geometry(padding=(1, 1)), activation)
    results = route._by_fused_kernel(x[:, :5], layer, mask[:7], residual, 7, saves=saves)
    expected = route._by_library(x, layer, mask[:7], residual, 5, 7, saves=saves)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("activation", ["identity", "relu", "hardswish"])
def test_the_pass_behind_a_convolution_may_scale_and_shift(activation, groups, saves):
    """As on CUDA, where the library would take a pass for the bias."""
    torch.manual_seed(0)
    x, scale, shift, mask = torch.randn(2, 8, 5, 5), *torch.rand(3, 8)
    residual = torch.randn(2, 8, 5, 5)
    layer = ConvLayer(
        torch.randn(8, 8 // groups, 3, 3), scale, shift, Geometry((1, 1), (1, 1), (1, 1), groups), activation
    )
    for open_in, rows in ((8, 8), (5, 6), (0, 6)):
        for added in (None, residual):
            folded, separate = (
                route._by_two_passes(x, layer, mask[:rows], added, open_in, rows, saves=saves, folds=folds)
                for folds in (True, False)
            )
            torch.testing.assert_close(separate, folded, rtol=1e-5, atol=1e-5)
            if activation != "hardswish":
                expected = route._by_library(x, layer, mask[:rows], added, open_in, rows, saves=saves)
                torch.testing.assert_close(separate, expected, rtol=1e-5, atol=1e-5)
