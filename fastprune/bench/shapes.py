"""The shapes of convolutions and channel groups in real networks."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune import models

RESNET50_GROUPS = [64] + [64] * 6 + [128] * 8 + [256] * 12 + [512] * 6 + [256, 512, 1024, 2048]
"""Units of ResNet-50's 37 channel groups: the stem, 32 inside blocks, 4 residual streams; 11,456 in all."""

NETWORKS = {"ResNet-50": 224, "MobileNetV2": 224, "ResNet-56": 32}
"""Networks and the side of their images."""

ACTIVATIONS = {"relu": "relu", "relu_": "relu", "hardtanh": "relu6", "hardtanh_": "relu6"}
"""Activations by torch's operator names; MobileNetV2's relu6 is a hardtanh there."""


@dataclass(frozen=True)
class ConvShape:
    """A convolution of a network.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel: height and width of the filters.
        stride: vertical and horizontal stride.
        padding: vertical and horizontal padding of each side.
        dilation: vertical and horizontal dilation.
        groups: 1, or ``in_channels`` for a depthwise one.
        height: height of the input.
        width: width of the input.
        activation: "relu", "relu6" or "none": the operator that directly follows the batch norm.
        count: number of such convolutions in the network.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    height: int
    width: int
    activation: str = "none"
    count: int = 1

    def __str__(self) -> str:
        """Return the text for tables: 64→128 3×3/2 at 56×56."""
        text = f"{self.in_channels}→{self.out_channels} {self.kernel[0]}×{self.kernel[1]}"
        if self.stride != (1, 1):
            text += f"/{self.stride[0]}"
        if self.groups > 1:
            text += f" in {self.groups} groups"
        return f"{text} at {self.height}×{self.width}, {self.activation}"

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return height, width

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        height, width = self.out_size
        return self.out_channels * height * width * self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    def elements(self, batch: int) -> tuple[int, int, int]:
        """Return the number of elements in the input, the weight and the output of a batch."""
        weight = self.out_channels * self.in_channels // self.groups * self.kernel[0] * self.kernel[1]
        height, width = self.out_size
        return batch * self.in_channels * self.height * self.width, weight, batch * self.out_channels * height * width


class _Recorder(TorchDispatchMode):
    """A record of every convolution of a forward pass, called by a module or a function."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[ConvShape] = []
        # Tensors that no operator but a batch norm has touched since their convolution, by id. They are kept alive
        # because a new tensor may get the id of a dead one.
        self.fresh: dict[int, tuple[Tensor, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and record a convolution or its activation."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.found.append(_convolution(*args))
            self.fresh[id(result)] = (result, len(self.found) - 1)
            return result
        origin = self.fresh.pop(id(args[0]), None) if args else None
        if origin is not None and "batch_norm" in name:
            output = result if isinstance(result, Tensor) else result[0]
            self.fresh[id(output)] = (output, origin[1])
        elif origin is not None and name in ACTIVATIONS:
            self.found[origin[1]] = replace(self.found[origin[1]], activation=ACTIVATIONS[name])
        return result


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> ConvShape:
    return ConvShape(
        in_channels=x.shape[1],
        out_channels=weight.shape[0],
        kernel=(weight.shape[2], weight.shape[3]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        height=x.shape[2],
        width=x.shape[3],
    )


def convolutions_of(model: nn.Module, side: int, channels: int = 3) -> list[ConvShape]:
    """List every distinct convolution of a network on square images, in the order of first occurrence.

    The pass runs on tensors without data and computes nothing.
    """
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        model.to("meta").eval()(torch.empty(1, channels, side, side, device="meta"))
    return [replace(shape, count=count) for shape, count in Counter(recorder.found).items()]


@functools.cache
def convolutions(network: str) -> tuple[ConvShape, ...]:
    """List every distinct convolution of "ResNet-50", "MobileNetV2" (224×224 images) or "ResNet-56" (32×32).

    Raises:
        ValueError: for another name.
        ModuleNotFoundError: if torchvision is needed and not installed.
    """
    if network not in NETWORKS:
        raise ValueError(f"network {network!r}: must be one of {', '.join(NETWORKS)}")
    with torch.device("meta"):
        model = network_of(network)
    return tuple(convolutions_of(model, NETWORKS[network]))


def network_of(network: str) -> nn.Module:
    """Return one of ``NETWORKS`` with random weights.

    Raises:
        ModuleNotFoundError: if torchvision is needed and not installed.
    """
    return models.resnet56() if network == "ResNet-56" else torchvision_network(network)


def torchvision_network(network: str) -> nn.Module:
    """Return ResNet-50 or MobileNetV2 with random weights.

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
    """
    try:
        import torchvision.models
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{network} needs torchvision: pip install 'fastprune[vision]'") from error
    make: Callable[[], nn.Module] = {
        "ResNet-50": torchvision.models.resnet50,
        "MobileNetV2": torchvision.models.mobilenet_v2,
    }[network]
    return make()
