"""A whole step of gate training, beside the same method in plain PyTorch.

DMC's gates follow every convolution inside a residual block (two in a bottleneck, one in a basic block) of a frozen
network. A step is forward, cross-entropy, backward into the gates, Adam, clip. It is written twice by hand: with torch
alone (``eager``, ``compiled``, both also in channels_last) and on FrozenConv (``fastprune``), which folds and packs
weights once, leaves products with gates to the next convolution, and skips closed channels. Gates are 1[theta >= 1/2],
with the gradient passed straight through, also for closed gates.

If half of the gates are closed, they are the second half of each vector, so the channels are already sorted; a search
sorts them when gates change, which this does not time. The parameters begin at 0 and 1 and hardly move, so no gate
changes meanwhile.

``floor`` is the work that no implementation can save: the remaining convolutions, forward and with respect to their
inputs, at the widths that the gradients of gates need, alone and through torch's library in channels_last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprune import models
from fastprune.bench.case import Attempted, Case, Compiled
from fastprune.bench.shapes import torchvision_network
from fastprune.methods.gates.gates import deterministic_gate
from fastprune.ops.conv.frozen import FrozenConv

LEARNING_RATE = 1e-3
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.3}
"""Tolerance in norm of the gates' gradient: rounding opens and closes relus in every layer."""

NETWORKS = ("ResNet-50", "ResNet-56")
"""Networks that are timed."""

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Computes the loss from gate parameters, images and labels."""


@dataclass(frozen=True)
class Block:
    """A residual block: relu and gates after all ``layers`` but the last, then the sum with the shortcut, and relu."""

    layers: list[Pair]
    shortcut: nn.Module


class Network:
    """The parts of a ResNet of ours or of torchvision."""

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
        """Yield the gates of each convolution."""
        return iter(deterministic_gate(theta).split(self.gates))

    def scores(self, x: Tensor) -> Tensor:
        """Return the network's scores in float32, from the output of the last block."""
        scores: Tensor = self.fc(torch.flatten(self.average(x), 1))
        return scores.float()


def block_of(block: Any) -> Block:
    """Return the parts of a residual block of ours or of torchvision."""
    layers = [(getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in (1, 2, 3) if hasattr(block, f"conv{n}")]
    shortcut = block.shortcut if hasattr(block, "shortcut") else block.downsample
    return Block(layers, nn.Identity() if shortcut is None else shortcut)


class Plain:
    """The loss in torch alone."""

    def __init__(self, network: Network, memory_format: torch.memory_format) -> None:
        self.network, self.memory_format = network, memory_format

    def __call__(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.scores(images, self.network.split(theta)), labels)

    def scores(self, images: Tensor, gates: Iterator[Tensor]) -> Tensor:
        """Return the network's scores with these gates."""
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
    """The loss on FrozenConv.

    Args:
        network: the network, whose weights do not change.
        open_counts: number of open channels, the first ones, of each convolution with gates.
    """

    def __init__(self, network: Network, open_counts: Sequence[int]) -> None:
        self.network, self.open_counts = network, open_counts
        self.stem = freeze(*network.stem)
        self.blocks = [
            ([freeze(*pair) for pair in block.layers], freeze_shortcut(block.shortcut)) for block in network.blocks
        ]

    def __call__(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        gates, counts = self.network.split(theta), iter(self.open_counts)
        x = self.network.pool(self.stem(images.contiguous(memory_format=torch.channels_last)))
        for (first, *inside, last), shortcut in self.blocks:
            y, x = first.branch(x, next(gates), open_out=next(counts), hard=True)
            for conv in inside:
                y = conv.defer(y, next(gates), open_out=next(counts), hard=True)
            x = last.defer(y, residual=shortcut(x))
        return F.cross_entropy(self.network.scores(x.settled()), labels)


def freeze(conv: nn.Conv2d, bn: nn.BatchNorm2d, activation: str = "relu") -> FrozenConv:
    """Freeze a convolution with its batch norm."""
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


def freeze_shortcut(shortcut: nn.Module) -> Callable[[Tensor], Tensor]:
    """Freeze a convolution with its batch norm; return a shortcut without parameters unchanged."""
    if not isinstance(shortcut, nn.Sequential):
        return shortcut
    conv, bn = cast("Pair", tuple(shortcut))
    return freeze(conv, bn, "identity")


class Step:
    """A step of one loss: backward, Adam, clip, with gate parameters of its own."""

    def __init__(self, loss: Loss, theta: Tensor) -> None:
        self.loss, self.theta = loss, nn.Parameter(theta.clone())
        self.optimizer = torch.optim.Adam([self.theta], lr=LEARNING_RATE)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Do a step and return the gradient that it followed."""
        gradient = self.gradient(images, labels)
        self.theta.grad = gradient
        self.optimizer.step()
        with torch.no_grad():
            self.theta.clamp_(0, 1)
        return gradient

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient of the loss with respect to the gates' parameters."""
        return torch.autograd.grad(self.loss(self.theta, images, labels), self.theta)[0]


class CapturedStep(Step):
    """A step with a CUDA graph for loss and gradient, as max-autotune makes for the compiled loss."""

    graph: torch.cuda.CUDAGraph | None = None

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Replay the graph that the first call captures."""
        if self.graph is None:
            self.inputs = images.clone(), labels.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate and choose algorithms in their first calls
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
    """The remaining convolutions alone.

    Forward reads open inputs and computes all outputs, since closed gates get gradients too. Backward reads gradients
    of open outputs and computes those of all inputs. Nothing before the first gates gets a gradient.
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
        """Add a convolution with tensors of its own."""
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
        """Compute all convolutions."""
        for x, weight, conv in self.forward:
            F.conv2d(x, weight, None, conv.stride, conv.padding)
        for dz, x, weight, conv in reversed(self.backward):
            geometry = (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)
            torch.ops.aten.convolution_backward(dz, x, weight, None, *geometry, (True, False, False))

    def work(self) -> tuple[float, float]:
        """Return bytes and floating-point operations."""
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
    """Return the input and output shapes of each convolution, from a pass that computes nothing."""
    sizes = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes[module] = inputs[0].shape, output.shape

    hooks = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(images))
    for hook in hooks:
        hook.remove()
    return sizes


def cases(device: torch.device, *, quick: bool = False, only: Sequence[str] = ()) -> Iterator[Case]:
    """Yield ResNet-56 and ResNet-50 or those of ``only``, each with all and with half of the gates open."""
    for name, (make, batch, side) in networks(device, quick=quick).items():
        if only and not quick and name not in only:
            continue
        model = prepare(make(), device)
        for half in (False, True):
            yield case(name, model, batch, side, device, half=half, compiled=not quick)


def networks(device: torch.device, *, quick: bool) -> dict[str, tuple[Callable[[], nn.Module], int, int]]:
    """Return for each network the function that makes it, the images in a batch, and their side."""
    on_cuda = device.type == "cuda"
    if quick:
        return {"ResNet-8": (lambda: models.ResNet(8), 2, 8)}
    return {
        "ResNet-56": (models.resnet56, 256 if on_cuda else 64, 32),
        "ResNet-50": (lambda: torchvision_network("ResNet-50"), 256 if on_cuda else 8, 224),
    }


def prepare(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Freeze a network and give its batch norms statistics like those of a trained one.

    Default dtype: bfloat16 on CUDA, float32 elsewhere.
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


def draw_batch(
    batch: int, side: int, classes: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Draw images and labels."""
    images = torch.randn(batch, 3, side, side, device=device).to(dtype)
    return images, torch.randint(classes, (batch,), device=device)


def case(
    name: str, model: nn.Module, batch: int, side: int, device: torch.device, *, half: bool, compiled: bool = True
) -> Case:
    """Return the case of a step of one network."""
    network, network_last = Network(model), Network(copy.deepcopy(model).to(memory_format=torch.channels_last))
    counts = [size // 2 if half else size for size in network.gates]
    theta = torch.cat(
        [(torch.arange(size) < count).float() for size, count in zip(network.gates, counts, strict=True)]
    ).to(device)
    dtype = network.stem[0].weight.dtype
    draw = partial(draw_batch, batch, side, int(network.fc.out_features), device, dtype)  # type: ignore[arg-type]
    plain = {"": Plain(network, torch.contiguous_format), " channels_last": Plain(network_last, torch.channels_last)}
    if device.type == "cuda":
        del plain[""]
    ours = Ours(network, counts)
    floor = Floor(network, counts, draw()[0])
    nbytes, flops = floor.work()
    configuration = "half of the gates closed" if half else "all gates open"
    return Case(
        f"{name}, batch {batch}, {configuration}",
        draw,
        make_variants(plain, ours, floor, theta, compiled=compiled),
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


def make_variants(
    plain: Mapping[str, Plain], ours: Ours, floor: Floor, theta: Tensor, *, compiled: bool
) -> dict[str, Callable[..., Any]]:
    """Return the steps of all losses, by name."""
    device = theta.device
    variants: dict[str, Callable[..., Any]] = {f"eager{kind}": Step(loss, theta) for kind, loss in plain.items()}
    if compiled:
        for kind, loss in plain.items():
            variants[f"compiled{kind}"] = Compiled(loss, device, lambda function: Step(function, theta))
    variants["floor"] = floor
    if device.type == "cuda":
        variants["fastprune in a graph"] = Attempted(CapturedStep(ours, theta))
    variants["fastprune"] = Step(ours, theta)
    return variants
