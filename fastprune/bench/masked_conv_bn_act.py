"""masked_conv_bn_act on every distinct convolution of three networks, beside torch's operators.

The weights are frozen, and each convolution has the activation that follows it in its network. ``eager`` is the usual
code: F.conv2d, F.batch_norm in eval mode, the activation, a product with the mask; on contiguous images, and also in
channels_last. ``compiled`` is that under torch.compile. ``cudnn`` (CUDA, relu) is cuDNN's fused convolution, bias and
relu with folded weights, then the product. ``one call`` is the operator, which folds and packs the weight in each call;
``fastprune`` is FrozenConv, which masked networks use: it has folded and packed the weight once.

Three workloads: ``forward`` has all channels open and prepares for the mask's gradient; ``half closed`` has no
gradients and only the first half of the input and output channels open, which peers compute with a mask of zeros;
``forward + backward`` has the gradients of x and of the mask (without torch.compile on the CPU, where it takes too
long). Float32 and a batch of 8 on the CPU; bfloat16, channels_last and a batch of 256 on CUDA. The roofline counts the
multiplications of a direct convolution; Winograd's algorithm needs fewer and may exceed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune import ops
from fastprune.bench.case import Attempted, Case, Compiled
from fastprune.bench.shapes import ConvShape, convolutions
from fastprune.ops.conv.frozen import FrozenConv

Images = Callable[[Tensor, Tensor], Tensor]
"""Computes y from x and a mask."""

ORDER = ("ResNet-56", "ResNet-50", "MobileNetV2")
"""The last two need torchvision, which may be missing."""

WORKLOADS = ("forward", "half closed", "forward + backward")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6}
QUICK = (
    ConvShape(8, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, 6, 6, "relu"),
    ConvShape(8, 8, (3, 3), (2, 2), (1, 1), (1, 1), 8, 6, 6, "relu6"),
    ConvShape(16, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, 5, 5),
)


class Layer:
    """One convolution with random parameters, and the ways to compute it.

    Args:
        shape: shape of the convolution.
        device: the device that it runs on.
        half: whether only the first half of the channels is open. An image's channels are always open.
    """

    def __init__(self, shape: ConvShape, device: torch.device, half: bool) -> None:
        self.shape, self.device, self.half = shape, device, half
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        inputs, outputs = shape.in_channels, shape.out_channels
        self.open_in = inputs // 2 if half and inputs > 3 else inputs
        self.open_out = outputs // 2 if half else outputs
        size = (outputs, inputs // shape.groups, *shape.kernel)
        weight = torch.randn(size, device=device) / (size[1] * size[2] * size[3]) ** 0.5
        self.weight = weight.to(self.dtype)
        self.weight_last = self.weight.contiguous(memory_format=torch.channels_last)
        gamma, variance = torch.rand(2, outputs, device=device) + 0.5
        beta, mean = torch.randn(2, outputs, device=device)
        self.bn = gamma, beta, mean, variance
        self.geometry: dict[str, Any] = {
            name: getattr(shape, name) for name in ("stride", "padding", "dilation", "groups")
        }
        activation = "identity" if shape.activation == "none" else shape.activation
        self.frozen = FrozenConv(self.weight, self.bn, activation=activation, **self.geometry)
        self.ours: dict[str, Any] = {"activation": activation, **self.geometry, "open_in": self.open_in}

    def draw(self, batch: int, gradients: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Draw x, x in channels_last, the mask, the gradient of y, and that in channels_last."""
        shape = self.shape
        height, width = shape.out_size
        x = torch.randn(batch, shape.in_channels, shape.height, shape.width, device=self.device).to(self.dtype)
        x[:, self.open_in :] = 0
        mask = torch.ones(shape.out_channels, device=self.device)
        mask[self.open_out :] = 0
        size = (batch, shape.out_channels, height, width) if "x" in gradients else (0, 1, 1, 1)
        dy = torch.randn(size, device=self.device).to(self.dtype)
        both = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, dy)]
        if self.device.type == "cuda":
            x, dy = both  # no variant there takes contiguous ones
        for tensor in (x, both[0]):
            tensor.requires_grad_("x" in gradients)
        return x, both[0], mask.requires_grad_("mask" in gradients), dy, both[1]

    def plain(self, x: Tensor, mask: Tensor) -> Tensor:
        """Compute it in the usual way."""
        return self.compute(self.weight, x, mask)

    def plain_last(self, x: Tensor, mask: Tensor) -> Tensor:
        """Compute it in the usual way with a weight in channels_last."""
        return self.compute(self.weight_last, x, mask)

    def compute(self, weight: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Compute convolution, batch norm, activation and product."""
        gamma, beta, mean, variance = self.bn
        z = F.batch_norm(F.conv2d(x, weight, None, **self.geometry), mean, variance, gamma, beta, training=False)
        return ACTIVATIONS[self.shape.activation](z) * mask.to(x.dtype).view(1, -1, 1, 1)

    def cudnn(self, x: Tensor, mask: Tensor) -> Tensor:
        """Call the fused operator of cuDNN, which has no gradient; these workloads need none for x."""
        shift = None if self.frozen.shift is None else self.frozen.shift.to(x.dtype)
        r = torch.cudnn_convolution_relu(x, self.frozen.weight, shift, **self.geometry)
        return r * mask.to(x.dtype).view(1, -1, 1, 1)

    def one_call(self, x: Tensor, mask: Tensor) -> Tensor:
        """Call the operator."""
        return ops.masked_conv_bn_act(x, self.weight_last, self.bn, mask, open_out=self.open_out, **self.ours)

    def fastprune(self, x: Tensor, mask: Tensor) -> Tensor:
        """Call the convolution that was folded and packed in advance."""
        return self.frozen(x, mask, open_in=self.open_in, open_out=self.open_out)


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Yield every distinct convolution of the networks in all three workloads."""
    for network in ("quick",) if quick else ORDER:
        for shape in QUICK if quick else spread(convolutions(network)):
            for workload in WORKLOADS:
                if quick:
                    yield case(network, shape, workload, device, batch=2, compiled=False)
                else:
                    yield case(network, shape, workload, device)


def spread(shapes: Sequence[ConvShape]) -> list[ConvShape]:
    """Reorder so that every prefix covers the whole network, since time may end early."""
    return [shapes[place] for place in sorted(range(len(shapes)), key=lambda place: place * 0.618034 % 1)]


def case(
    network: str,
    shape: ConvShape,
    workload: str,
    device: torch.device,
    *,
    batch: int | None = None,
    compiled: bool = True,
) -> Case:
    """Return the case of one convolution in one workload."""
    on_cuda, half, backward = device.type == "cuda", workload == "half closed", workload == "forward + backward"
    batch = batch or (256 if on_cuda else 8)
    layer = Layer(shape, device, half)
    gradients: tuple[str, ...] = () if half else ("x", "mask") if backward else ("mask",)
    nbytes, flops = least_work(shape, layer, batch, backward)
    return Case(
        f"{network}, {shape}: {workload}",
        lambda: layer.draw(batch, gradients),
        make_variants(layer, backward=backward, compiled=compiled),
        bytes=nbytes,
        flops=flops,
        precision="bfloat16" if on_cuda else "float32",
        shape={"network": network, "workload": workload, "batch": batch, **vars(shape)},
        groups=(workload, f"{workload}, {network}"),
        norm=tolerance(on_cuda, backward),
        fresh=False,
        clock="events",
        rounds=50,
        seconds=1.0,
    )


def make_variants(layer: Layer, *, backward: bool, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Return the variants that the layer's device has."""
    device, on_cuda = layer.device, layer.device.type == "cuda"
    finish = gradient_call if backward else forward_call
    variants: dict[str, Callable[..., Any]] = {}
    if on_cuda:
        variants["eager"] = finish(layer.plain_last)
    else:
        variants["eager"] = finish(layer.plain, last=False)
        variants["eager channels_last"] = finish(layer.plain_last)
    if compiled and on_cuda:
        variants["compiled"] = Compiled(layer.plain_last, device, finish)
    elif compiled and not backward:
        variants["compiled"] = Compiled(layer.plain, device, partial(finish, last=False))
        variants["compiled channels_last"] = Compiled(layer.plain_last, device, finish)
    if on_cuda and layer.shape.activation == "relu" and not backward:
        variants["cudnn"] = Attempted(finish(layer.cudnn))
    variants["one call"] = finish(layer.one_call)
    variants["fastprune"] = finish(layer.fastprune)
    return variants


def forward_call(function: Images, last: bool = True) -> Callable[..., Tensor]:
    """Return a function of the drawn tensors that computes y."""

    def call(x: Tensor, x_last: Tensor, mask: Tensor, *_: Tensor) -> Tensor:
        return function(x_last if last else x, mask)

    return call


def gradient_call(function: Images, last: bool = True) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return a function of the drawn tensors that computes y and the gradients of x and the mask."""

    def call(x: Tensor, x_last: Tensor, mask: Tensor, dy: Tensor, dy_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, dy = (x_last, dy_last) if last else (x, dy)
        y = function(x, mask)
        dx, dmask = torch.autograd.grad(y, (x, mask), dy)
        return y.detach(), dx, dmask

    return call


def least_work(shape: ConvShape, layer: Layer, batch: int, backward: bool) -> tuple[float, float]:
    """Return bytes and operations: open channels are read and reduced over, and all of y is written."""
    x, weight, y = shape.elements(batch)
    read = layer.open_in / shape.in_channels
    computed = layer.open_out / shape.out_channels
    pairs = computed * (read if shape.groups == 1 else 1)
    numbers, macs = read * x + pairs * weight + y, pairs * shape.macs * batch
    if backward:  # reads dy, the weight and y, writes dx
        numbers, macs = numbers + 2 * y + weight + x, 2 * macs
    return numbers * layer.weight.element_size(), 2 * macs


def tolerance(on_cuda: bool, backward: bool) -> float:
    """Return the tolerance in norm: rounding flips few of a million relus in float32, some of a hundred in bfloat16."""
    return {(False, False): 1e-4, (False, True): 5e-3, (True, False): 2e-2, (True, True): 0.15}[on_cuda, backward]
