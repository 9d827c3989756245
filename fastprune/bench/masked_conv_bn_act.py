"""masked_conv_bn_act on every distinct convolution of three networks, beside what torch offers.

The weights are frozen, and each convolution has the activation that follows it in its network. ``eager`` is written as
usual: F.conv2d, F.batch_norm in eval mode, the activation, a product with the mask; on contiguous images, and beside it
in channels_last. ``compiled`` is that under torch.compile. ``cudnn`` (CUDA, relu) is cuDNN's fused convolution, bias
and relu with folded weights, then the product. ``one call`` is the operator, which folds and packs the weight each
time; ``fastprune`` is FrozenConv, which a masked network uses: it has done that once.

Three workloads: ``forward`` with all channels open, by somebody who will want the mask's gradient; ``half closed``
without gradients, the first half of the channels open on either side, which peers compute with a mask of zeros;
``forward + backward``, the gradients of x and of the mask (on the CPU without torch.compile, for the time that takes).
Float32 and a batch of 8 on the CPU; bfloat16, channels_last and a batch of 256 on CUDA. The roofline is that of the
convolution as it is defined: Winograd's algorithm multiplies less and may be above it.
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
"""From x and a mask to y."""

ORDER = ("ResNet-56", "ResNet-50", "MobileNetV2")
"""The last two are torchvision's and not everywhere."""

WORKLOADS = ("forward", "half closed", "forward + backward")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6}
QUICK = (
    ConvShape(8, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, 6, 6, "relu"),
    ConvShape(8, 8, (3, 3), (2, 2), (1, 1), (1, 1), 8, 6, 6, "relu6"),
    ConvShape(16, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, 5, 5),
)


class Layer:
    """One convolution with random parameters, computed by everybody.

    Args:
        shape: of the convolution.
        device: where it runs.
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
        self.moves: dict[str, Any] = {
            name: getattr(shape, name) for name in ("stride", "padding", "dilation", "groups")
        }
        activation = "identity" if shape.activation == "none" else shape.activation
        self.frozen = FrozenConv(self.weight, self.bn, activation=activation, **self.moves)
        self.ours: dict[str, Any] = {"activation": activation, **self.moves, "open_in": self.open_in}

    def draw(self, batch: int, gradients: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Draw x and the same in channels_last, the mask, the gradient of y and the same in channels_last."""
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
            x, dy = both  # nobody takes the other
        for tensor in (x, both[0]):
            tensor.requires_grad_("x" in gradients)
        return x, both[0], mask.requires_grad_("mask" in gradients), dy, both[1]

    def plain(self, x: Tensor, mask: Tensor) -> Tensor:
        """As everybody writes it."""
        return self.plain_with(self.weight, x, mask)

    def plain_last(self, x: Tensor, mask: Tensor) -> Tensor:
        """The same with a weight in channels_last."""
        return self.plain_with(self.weight_last, x, mask)

    def plain_with(self, weight: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Convolution, batch norm, activation, product."""
        gamma, beta, mean, variance = self.bn
        z = F.batch_norm(F.conv2d(x, weight, None, **self.moves), mean, variance, gamma, beta, training=False)
        return ACTIVATIONS[self.shape.activation](z) * mask.to(x.dtype).view(1, -1, 1, 1)

    def cudnn(self, x: Tensor, mask: Tensor) -> Tensor:
        """The fused operator of cuDNN. It has no gradient, and without that of x it needs none."""
        shift = None if self.frozen.shift is None else self.frozen.shift.to(x.dtype)
        r = torch.cudnn_convolution_relu(x, self.frozen.weight, shift, **self.moves)
        return r * mask.to(x.dtype).view(1, -1, 1, 1)

    def one_call(self, x: Tensor, mask: Tensor) -> Tensor:
        """The operator."""
        return ops.masked_conv_bn_act(x, self.weight_last, self.bn, mask, open_out=self.open_out, **self.ours)

    def fastprune(self, x: Tensor, mask: Tensor) -> Tensor:
        """Folded and packed in advance."""
        return self.frozen(x, mask, open_in=self.open_in, open_out=self.open_out)


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Every distinct convolution of the networks, three times."""
    for network in ("quick",) if quick else ORDER:
        for shape in QUICK if quick else spread(convolutions(network)):
            for workload in WORKLOADS:
                if quick:
                    yield case(network, shape, workload, device, batch=2, compiled=False)
                else:
                    yield case(network, shape, workload, device)


def spread(shapes: Sequence[ConvShape]) -> list[ConvShape]:
    """Ordered so that those for which there is time are from all over the network."""
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
    """One convolution in one workload."""
    on_cuda, half, backward = device.type == "cuda", workload == "half closed", workload == "forward + backward"
    batch = batch or (256 if on_cuda else 8)
    layer = Layer(shape, device, half)
    gradients: tuple[str, ...] = () if half else ("x", "mask") if backward else ("mask",)
    finish = with_gradients if backward else forward_alone
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
    if on_cuda and shape.activation == "relu" and not backward:
        variants["cudnn"] = Attempted(finish(layer.cudnn))
    variants["one call"] = finish(layer.one_call)
    variants["fastprune"] = finish(layer.fastprune)
    nbytes, flops = least_work(shape, layer, batch, backward)
    return Case(
        f"{network}, {shape}: {workload}",
        lambda: layer.draw(batch, gradients),
        variants,
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


def forward_alone(function: Images, last: bool = True) -> Callable[..., Tensor]:
    """Forward of what is drawn."""

    def call(x: Tensor, x_last: Tensor, mask: Tensor, *_: Tensor) -> Tensor:
        return function(x_last if last else x, mask)

    return call


def with_gradients(function: Images, last: bool = True) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Forward, and the gradients of x and the mask."""

    def call(x: Tensor, x_last: Tensor, mask: Tensor, dy: Tensor, dy_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, dy = (x_last, dy_last) if last else (x, dy)
        y = function(x, mask)
        dx, dmask = torch.autograd.grad(y, (x, mask), dy)
        return y.detach(), dx, dmask

    return call


def least_work(shape: ConvShape, layer: Layer, batch: int, backward: bool) -> tuple[float, float]:
    """Bytes and operations: open channels are read and reduced over, and all of y is written."""
    x, weight, y = shape.elements(batch)
    read = layer.open_in / shape.in_channels
    computed = layer.open_out / shape.out_channels
    pairs = computed * (read if shape.groups == 1 else 1)
    numbers, macs = read * x + pairs * weight + y, pairs * shape.macs * batch
    if backward:  # reads dy, the weight and y, writes dx
        numbers, macs = numbers + 2 * y + weight + x, 2 * macs
    return numbers * layer.weight.element_size(), 2 * macs


def tolerance(on_cuda: bool, backward: bool) -> float:
    """In norm. A rounding opens or closes a few relus: few of a million in float32, some of a hundred in bfloat16."""
    return {(False, False): 1e-4, (False, True): 5e-3, (True, False): 2e-2, (True, True): 0.15}[on_cuda, backward]
