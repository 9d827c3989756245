"""A whole step of gate training, beside the same method in plain PyTorch.

DMC's gates, behind every convolution inside a residual block (two in a bottleneck, one in a basic block), in a frozen
network: forward, cross-entropy, backward into the gates, Adam, clip. Written twice by hand, as one would with torch
alone (``eager``, ``compiled``, either in channels_last too) and on FrozenConv (``fastprune``): weights folded and
packed once, products with gates left to the next convolution, closed channels skipped. Gates are 1[theta >= 1/2], with
the gradient passed straight through, closed gates' too.

With half of the gates closed it is the second half of each vector, that is, the channels are already sorted: a search
sorts them when gates change, which this does not time. The parameters begin at 0 and 1 and hardly move, so that no gate
changes meanwhile.

``floor`` is what nobody saves: the convolutions that remain, forward and with respect to their inputs, at the widths
that gates' gradients need, alone and through torch's library in channels_last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprune import models
from fastprune.bench.case import Attempted, Case, Compiled
from fastprune.bench.shapes import from_torchvision
from fastprune.methods.gates.gates import deterministic_gate
from fastprune.ops.conv.frozen import FrozenConv

LEARNING_RATE = 1e-3
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.3}
"""In norm, of the gates' gradient: roundings open and close relus, layer after layer."""

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From gate parameters, images and labels."""


@dataclass(frozen=True)
class Block:
    """A residual block: relu and gates behind all of ``layers`` but the last, then the shortcut's sum and relu."""

    layers: list[Pair]
    shortcut: nn.Module


class Network:
    """The parts of a ResNet, ours or torchvision's."""

    def __init__(self, model: nn.Module) -> None:
        parts: Any = model
        self.model = model
        self.stem: Pair = (parts.conv1, parts.bn1)
        self.pool: nn.Module = getattr(parts, "maxpool", nn.Identity())
        self.average: nn.Module = parts.avgpool if hasattr(parts, "avgpool") else parts.pool
        self.fc: nn.Module = parts.fc
        stages = [getattr(parts, f"layer{n}") for n in range(1, 5) if hasattr(parts, f"layer{n}")]
        self.blocks = [block_of(block) for stage in stages for block in stage]
        self.gates = [conv.out_channels for block in self.blocks for conv, _ in block.layers[:-1]]

    def split(self, theta: Tensor) -> Iterator[Tensor]:
        """Each convolution's gates."""
        return iter(deterministic_gate(theta).split(self.gates))

    def scores(self, x: Tensor) -> Tensor:
        """What the network says about what the last block gave, float32."""
        scores: Tensor = self.fc(torch.flatten(self.average(x), 1))
        return scores.float()


def block_of(block: Any) -> Block:
    """The parts of a residual block, ours or torchvision's."""
    layers = [(getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in (1, 2, 3) if hasattr(block, f"conv{n}")]
    shortcut = block.shortcut if hasattr(block, "shortcut") else block.downsample
    return Block(layers, nn.Identity() if shortcut is None else shortcut)


class Plain:
    """As one writes it with torch alone."""

    def __init__(self, network: Network, memory_format: torch.memory_format) -> None:
        self.network, self.memory_format = network, memory_format

    def __call__(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.scores(images, self.network.split(theta)), labels)

    def scores(self, images: Tensor, gates: Iterator[Tensor]) -> Tensor:
        """The network's scores, behind each convolution's gates."""
        network = self.network
        conv, bn = network.stem
        x = network.pool(F.relu(bn(conv(images.contiguous(memory_format=self.memory_format))), inplace=True))
        for block in network.blocks:
            y = x
            for conv, bn in block.layers[:-1]:
                y = F.relu(bn(conv(y)), inplace=True) * next(gates).to(x.dtype).view(1, -1, 1, 1)
            conv, bn = block.layers[-1]
            x = F.relu(bn(conv(y)) + block.shortcut(x), inplace=True)
        return network.scores(x)


class Ours:
    """On FrozenConv.

    Args:
        network: whose weights do not change.
        open_counts: how many channels are open, the first ones, of each convolution with gates.
    """

    def __init__(self, network: Network, open_counts: Sequence[int]) -> None:
        self.network, self.open_counts = network, open_counts
        self.stem = frozen(*network.stem)
        self.blocks = [
            ([frozen(*pair) for pair in block.layers], frozen_shortcut(block.shortcut)) for block in network.blocks
        ]

    def __call__(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        gates, counts = self.network.split(theta), iter(self.open_counts)
        x = self.network.pool(self.stem(images.contiguous(memory_format=torch.channels_last)))
        for (first, *inside, last), shortcut in self.blocks:
            y, x = first.branch(x, next(gates), open_out=next(counts), hard=True)
            for conv in inside:
                y = conv.defer(y, next(gates), open_out=next(counts), hard=True)
            x = last.defer(y, residual=shortcut(x))
        return F.cross_entropy(self.network.scores(x.settled()), labels)


def frozen(conv: nn.Conv2d, bn: nn.BatchNorm2d, activation: str = "relu") -> FrozenConv:
    """A convolution with its batch norm."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    return FrozenConv(
        conv.weight,
        (bn.weight, bn.bias, bn.running_mean, bn.running_var),
        stride=conv.stride,
        padding=conv.padding if isinstance(conv.padding, tuple) else 0,
        activation=activation,
        eps=bn.eps,
    )


def frozen_shortcut(shortcut: nn.Module) -> Callable[[Tensor], Tensor]:
    """A convolution with its batch norm, or what has no parameters as it is."""
    if not isinstance(shortcut, nn.Sequential):
        return shortcut
    conv, bn = cast("Pair", tuple(shortcut))
    return frozen(conv, bn, "identity")


class Step:
    """What is around the loss: backward, Adam, clip. Has gate parameters of its own."""

    def __init__(self, loss: Loss, theta: Tensor) -> None:
        self.loss, self.theta = loss, nn.Parameter(theta.clone())
        self.optimizer = torch.optim.Adam([self.theta], lr=LEARNING_RATE)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Do a step; returns the gradient that it followed."""
        gradient = self.gradient(images, labels)
        self.theta.grad = gradient
        self.optimizer.step()
        with torch.no_grad():
            self.theta.clamp_(0, 1)
        return gradient

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of the loss with respect to the gates' parameters."""
        return torch.autograd.grad(self.loss(self.theta, images, labels), self.theta)[0]


class CapturedStep(Step):
    """The same with a CUDA graph for loss and gradient, as max-autotune makes one of the compiled loss."""

    graph: torch.cuda.CUDAGraph | None = None

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Replay what the first call has captured."""
        if self.graph is None:
            self.inputs = images.clone(), labels.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate and choose algorithms when they are first called
                for _ in range(3):
                    super().gradient(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.captured = super().gradient(*self.inputs)
            self.graph = graph
        for mine, given in zip(self.inputs, (images, labels), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.captured.clone()


class Floor:
    """The convolutions that remain, alone.

    Forward reads open inputs; it computes closed outputs, too, whose gates get gradients. Backward reads gradients of
    open outputs; it computes those of closed inputs, too. Nothing in front of the first gates gets a gradient.
    """

    def __init__(self, network: Network, open_counts: Sequence[int], images: Tensor) -> None:
        self.forward: list[tuple[Tensor, Tensor, nn.Conv2d]] = []
        self.backward: list[tuple[Tensor, Tensor, Tensor, nn.Conv2d]] = []
        self.sizes = sizes_of(network.model, images)
        counts = iter(open_counts)
        self.add(network.stem[0], None, None, in_graph=False)
        for number, block in enumerate(network.blocks):
            open_in = None
            for place, (conv, _) in enumerate(block.layers):
                open_out = next(counts) if place < len(block.layers) - 1 else None
                self.add(conv, open_in, open_out, in_graph=number > 0 or place > 0)
                open_in = open_out
            if isinstance(block.shortcut, nn.Sequential):
                self.add(block.shortcut[0], None, None, in_graph=number > 0)

    def add(self, conv: Any, open_in: int | None, open_out: int | None, *, in_graph: bool) -> None:
        """One convolution, with tensors of its own."""
        x_size, y_size = self.sizes[conv]
        weight = conv.weight.detach()
        x, dz = (
            torch.randn(size, device=weight.device).to(weight.dtype, memory_format=torch.channels_last)
            for size in (x_size, y_size)
        )
        last = {"memory_format": torch.channels_last}
        self.forward.append((x[:, :open_in].contiguous(**last), weight[:, :open_in].contiguous(**last), conv))
        if in_graph:
            self.backward.append((dz[:, :open_out].contiguous(**last), x, weight[:open_out].contiguous(**last), conv))

    def __call__(self, *_: Tensor) -> None:
        """Compute all of them."""
        for x, weight, conv in self.forward:
            F.conv2d(x, weight, None, conv.stride, conv.padding)
        for dz, x, weight, conv in reversed(self.backward):
            moves = (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)
            torch.ops.aten.convolution_backward(dz, x, weight, None, *moves, (True, False, False))

    def work(self) -> tuple[float, float]:
        """Bytes and operations."""
        nbytes = flops = 0.0
        for x, weight, conv in self.forward:
            y = self.sizes[conv][1]
            nbytes += x.nbytes + weight.nbytes + y.numel() * x.element_size()
            flops += 2 * y.numel() * weight[0].numel()
        for dz, x, weight, _ in self.backward:
            nbytes += dz.nbytes + weight.nbytes + x.nbytes
            flops += 2 * dz.numel() * weight[0].numel()
        return nbytes, flops


def sizes_of(model: nn.Module, images: Tensor) -> dict[nn.Module, tuple[torch.Size, torch.Size]]:
    """What goes in and out of each convolution. Nothing is computed."""
    sizes = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes[module] = inputs[0].shape, output.shape

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(images))
    for hook in hooks:
        hook.remove()
    return sizes


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """ResNet-56 and ResNet-50, all gates open and half of them."""
    for name, (make, batch, side) in networks(device, quick=quick).items():
        model = prepared(make(), device)
        for half in (False, True):
            yield case(name, model, batch, side, device, half=half, compiled=not quick)


def networks(device: torch.device, *, quick: bool) -> dict[str, tuple[Callable[[], nn.Module], int, int]]:
    """By name what makes a network, the images in a batch, and their side."""
    on_cuda = device.type == "cuda"
    if quick:
        return {"ResNet-8": (lambda: models.ResNet(8), 2, 8)}
    return {
        "ResNet-56": (models.resnet56, 256 if on_cuda else 64, 32),
        "ResNet-50": (lambda: from_torchvision("ResNet-50"), 256 if on_cuda else 8, 224),
    }


def prepared(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The network frozen, its batch norms given statistics as if it had been trained.

    Without a ``dtype`` in bfloat16 on CUDA, in float32 elsewhere.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.to(device, dtype).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model


def case(
    name: str, model: nn.Module, batch: int, side: int, device: torch.device, *, half: bool, compiled: bool = True
) -> Case:
    """A step of one network."""
    network, network_last = Network(model), Network(copy.deepcopy(model).to(memory_format=torch.channels_last))
    counts = [size // 2 if half else size for size in network.gates]
    theta = torch.cat(
        [(torch.arange(size) < count).float() for size, count in zip(network.gates, counts, strict=True)]
    ).to(device)
    dtype = network.stem[0].weight.dtype
    classes = int(network.fc.out_features)  # type: ignore[arg-type]

    def draw() -> tuple[Tensor, Tensor]:
        images = torch.randn(batch, 3, side, side, device=device).to(dtype)
        return images, torch.randint(classes, (batch,), device=device)

    plain = {"": Plain(network, torch.contiguous_format), " channels_last": Plain(network_last, torch.channels_last)}
    if device.type == "cuda":
        del plain[""]
    ours = Ours(network, counts)
    floor = Floor(network, counts, draw()[0])
    variants: dict[str, Callable[..., Any]] = {f"eager{kind}": Step(loss, theta) for kind, loss in plain.items()}
    if compiled:
        for kind, loss in plain.items():
            variants[f"compiled{kind}"] = Compiled(loss, device, lambda function: Step(function, theta))
    variants["floor"] = floor
    if device.type == "cuda":
        variants["fastprune in a graph"] = Attempted(CapturedStep(ours, theta))
    variants["fastprune"] = Step(ours, theta)
    nbytes, flops = floor.work()
    configuration = "half of the gates closed" if half else "all gates open"
    return Case(
        f"{name}, batch {batch}, {configuration}",
        draw,
        variants,
        bytes=nbytes,
        flops=flops,
        precision="bfloat16" if device.type == "cuda" else "float32",
        shape={"network": name, "batch": batch, "side": side, "gates": len(theta), "open": int(theta.sum())},
        groups=(configuration,),
        norm=TOLERANCE[dtype],
        unchecked=("floor",),
        rounds=30,
        seconds=30.0,
    )
