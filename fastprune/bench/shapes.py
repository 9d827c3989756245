"""The shapes that kernels meet in real networks: convolutions and channel groups."""

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
"""Units of ResNet-50's 37 channel groups: the stem, 32 inside of blocks, 4 residual streams; 11,456 in all."""

NETWORKS = {"ResNet-50": 224, "MobileNetV2": 224, "ResNet-56": 32}
"""Networks and the side of their images."""

ACTIVATIONS = {"relu": "relu", "relu_": "relu", "hardtanh": "relu6", "hardtanh_": "relu6"}
"""By the names of torch's operators; MobileNetV2's relu6 is a hardtanh there."""


@dataclass(frozen=True)
class ConvShape:
    """A convolution as it occurs in a network.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        kernel: height and width of the filters.
        stride: vertical and horizontal.
        padding: vertical and horizontal, on either side.
        dilation: vertical and horizontal.
        groups: 1, or ``in_channels`` for a depthwise one.
        height: of what comes in.
        width: of what comes in.
        activation: "relu", "relu6" or "none": what follows, behind the batch norm, before anything else happens.
        count: how often the network has it.
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
        """For tables: 64→128 3×3/2 at 56×56."""
        text = f"{self.in_channels}→{self.out_channels} {self.kernel[0]}×{self.kernel[1]}"
        if self.stride != (1, 1):
            text += f"/{self.stride[0]}"
        if self.groups > 1:
            text += f" in {self.groups} groups"
        return f"{text} at {self.height}×{self.width}, {self.activation}"

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of what goes out."""
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return height, width

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        height, width = self.out_size
        return self.out_channels * height * width * self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    def elements(self, batch: int) -> tuple[int, int, int]:
        """Numbers in the input, the weight and the output of a batch."""
        weight = self.out_channels * self.in_channels // self.groups * self.kernel[0] * self.kernel[1]
        height, width = self.out_size
        return batch * self.in_channels * self.height * self.width, weight, batch * self.out_channels * height * width


class _Recorder(TorchDispatchMode):
    """Sees every operator of a forward pass, whether a module or a function calls it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[ConvShape] = []
        # Tensors that no operator but a batch norm has touched since their convolution, by id, and kept alive: an id is
        # given again to a new tensor once its owner is gone.
        self.fresh: dict[int, tuple[Tensor, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and note what it says about a convolution."""
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
    """Every distinct convolution of a network on square images, in the order of its first occurrence.

    Nothing is computed: the pass runs on tensors without data.
    """
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        model.to("meta").eval()(torch.empty(1, channels, side, side, device="meta"))
    return [replace(shape, count=count) for shape, count in Counter(recorder.found).items()]


@functools.cache
def convolutions(network: str) -> tuple[ConvShape, ...]:
    """Every distinct convolution of "ResNet-50", "MobileNetV2" (224×224 images) or "ResNet-56" (32×32).

    Raises:
        ValueError: for another name.
        ModuleNotFoundError: where torchvision is needed and not installed.
    """
    if network not in NETWORKS:
        raise ValueError(f"network {network!r}: needs one of {', '.join(NETWORKS)}")
    with torch.device("meta"):
        model = models.resnet56() if network == "ResNet-56" else from_torchvision(network)
    return tuple(convolutions_of(model, NETWORKS[network]))


def from_torchvision(network: str) -> nn.Module:
    """ResNet-50 or MobileNetV2 with random weights.

    Raises:
        ModuleNotFoundError: where torchvision is not installed.
    """
    try:
        import torchvision.models
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{network} is torchvision's: pip install 'fastprune[vision]'") from error
    make: Callable[[], nn.Module] = {
        "ResNet-50": torchvision.models.resnet50,
        "MobileNetV2": torchvision.models.mobilenet_v2,
    }[network]
    return make()
