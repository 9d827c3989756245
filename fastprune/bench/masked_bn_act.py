"""The passes between convolutions, on the inputs of ResNet-50's batch norms.

Batch 8 in float32 on the CPU, 256 in bfloat16 on CUDA. ``backward`` is the kernel alone, into allocated memory: it
reads dy and the saved activation and writes dx and the gradient of the mask. ``forward`` is
:func:`fastprune.ops.masked_bn_act` with frozen statistics before a backward pass: it reads x and writes y and the saved
tensors. ``step`` is forward, and backward to x and mask. The ``network`` has every activation as often as ResNet-50.
Last come activations of few channels.

``eager`` is fastprune.reference; its backward pass is the gradient with as few operators as torch allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune import _C, ops, reference
from fastprune.bench.case import Case
from fastprune.ops.masked_act import masked_act

RESNET50 = [
    (64, 112, 1),
    (64, 56, 6),
    (256, 56, 4),
    (128, 56, 1),
    (128, 28, 7),
    (512, 28, 5),
    (256, 28, 1),
    (256, 14, 11),
    (1024, 14, 7),
    (512, 14, 1),
    (512, 7, 5),
    (2048, 7, 4),
]
"""Channels, side, and number of such activations that ResNet-50 normalises."""
PRUNED = [(3, 32), (8, 32), (13, 32), (16, 32)]
"""Channels and side of activations in the first stage of a pruned ResNet for CIFAR."""

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Activation:
    """One activation in one memory format, with the vectors of its channels."""

    shape: tuple[int, int, int, int]
    count: int
    dtype: torch.dtype
    memory_format: torch.memory_format
    bn: tuple[Tensor, Tensor, Tensor, Tensor]
    mask: Tensor
    partials: Tensor | None
    """Scratch memory of the backward pass on CUDA."""

    @classmethod
    def create(cls, channels: int, size: int, count: int, layout: str, device: torch.device, batch: int) -> Activation:
        """Make an activation with shift and mean 0: rounding them could change a few of a million relus."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        zeros = torch.zeros(channels, device=device)
        bn = torch.rand(channels, device=device) + 0.5, zeros, zeros, torch.rand(channels, device=device) + 0.5
        mask = (torch.rand(channels, device=device) > 0.5).float()
        shape, partials = (batch, channels, size, size), None
        if device.type == "cuda":
            like = torch.empty(shape, device=device, dtype=dtype, memory_format=FORMATS[layout])
            needed = _C.masked_act_partials(like, like, None, torch.empty_like(like))
            partials = torch.empty(needed, dtype=torch.float64, device=device)
        return cls(shape, count, dtype, FORMATS[layout], bn, mask, partials)

    @property
    def bytes(self) -> int:
        """The bytes of one stream, times the number of such activations in the network."""
        return self.count * self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3] * self.dtype.itemsize

    def x(self) -> Tensor:
        """Draw values of both signs."""
        return self._fill(torch.randn)

    def dy(self) -> Tensor:
        """Draw positive values, so that the gradient of the mask is a sum without cancellation."""
        return self._fill(torch.rand)

    def _fill(self, make: Callable[..., Tensor]) -> Tensor:
        values = make(self.shape, device=self.mask.device, dtype=torch.float32)
        return values.to(self.dtype).contiguous(memory_format=self.memory_format)

    def fastprune_backward(self, dy: Tensor, saved: Tensor, dx: Tensor, dmask: Tensor) -> None:
        """Call the kernel."""
        inputs = dy, saved, None, self.mask, self.bn[0], None, None, None, "relu"
        _C.masked_act_backward(*inputs, dx, dmask, None, None, self.partials, num_threads=torch.get_num_threads())

    def eager_backward(self, dy: Tensor, saved: Tensor, dx: Tensor, dmask: Tensor) -> None:
        """Call the operators that the kernel fuses."""
        factor = (self.mask * self.bn[0]).to(dy.dtype).view(1, -1, 1, 1)
        torch.mul(dy, saved > 0, out=dx).mul_(factor)
        torch.sum(dy * saved, (0, 2, 3), dtype=dmask.dtype, out=dmask)

    def step(self, function: Callable[..., Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of x and mask."""
        x, mask = x.detach().requires_grad_(), self.mask.detach().requires_grad_()
        return torch.autograd.grad(function(x, self.bn, mask), (x, mask), dy)

    def forward(self, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Return y of a forward pass that saves tensors for the backward pass."""
        return function(x.detach().requires_grad_(), self.bn, self.mask.detach().requires_grad_()).detach()


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Yield the network's passes in both memory formats, then its activations one by one."""
    if quick:
        small = [
            Activation.create(10, 6, 2, "channels_last", device, 2),
            Activation.create(6, 5, 1, "channels_last", device, 2),
        ]
        yield from (make("two activations", small) for make in (backward, forward, step))
        return
    batch = 256 if device.type == "cuda" else 8
    for layout in FORMATS:
        network = [Activation.create(*shape, layout, device, batch) for shape in RESNET50]
        for make in (backward, forward, step):
            yield make(f"network, {layout}", network)
    for channels, size, _ in RESNET50:
        yield backward(
            f"{channels}×{size}×{size}", [Activation.create(channels, size, 1, "channels_last", device, batch)]
        )
    for channels, size in PRUNED:
        small = [Activation.create(channels, size, 1, "channels_last", device, 8 * batch)]
        yield backward(f"{channels}×{size}×{size}, batch {8 * batch}", small)


def describe(activations: list[Activation]) -> dict[str, int]:
    """Return the shape for programs."""
    batch, channels, height, _ = activations[0].shape
    one = {"channels": channels, "size": height} if len(activations) == 1 else {}
    return {"batch": batch, "activations": sum(activation.count for activation in activations), **one}


def call_order(activations: list[Activation]) -> list[int]:
    """List each index as often as the network has the activation, in turns, so that no cache holds the next one."""
    most = max(activation.count for activation in activations)
    return [i for turn in range(most) for i, activation in enumerate(activations) if turn < activation.count]


def backward(name: str, activations: list[Activation]) -> Case:
    """Return the case of backward passes: three streams."""

    def draw() -> tuple[list[Tensor], ...]:
        dy = [activation.dy() for activation in activations]
        saved = [masked_act(activation.x(), want_saved=True)[1] for activation in activations]
        dx = [torch.empty_like(t) for t in dy]
        return dy, saved, dx, [torch.empty_like(activation.mask) for activation in activations]

    def variant(function: Callable[..., None]) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
        def run(*tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            for index in call_order(activations):
                function(activations[index], *(each[index] for each in tensors))
            return tensors[2], tensors[3]

        return run

    variants = {"eager": variant(Activation.eager_backward), "fastprune": variant(Activation.fastprune_backward)}
    return case(f"backward, {name}", draw, variants, activations, streams=3)


def forward(name: str, activations: list[Activation]) -> Case:
    """Return the case of forward passes, three streams: x in, y and the saved tensor out."""

    def variant(function: Callable[..., Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        def run(xs: list[Tensor]) -> list[Tensor]:
            results = {i: activations[i].forward(function, xs[i]) for i in call_order(activations)}
            return list(results.values())

        return run

    variants = {"eager": variant(reference.masked_bn_act), "fastprune": variant(ops.masked_bn_act)}
    return case(f"forward, {name}", lambda: ([a.x() for a in activations],), variants, activations, streams=3)


def step(name: str, activations: list[Activation]) -> Case:
    """Return the case of forward and backward passes: six streams."""

    def variant(function: Callable[..., Tensor]) -> Callable[..., list[tuple[Tensor, ...]]]:
        def run(xs: list[Tensor], dys: list[Tensor]) -> list[tuple[Tensor, ...]]:
            results = {i: activations[i].step(function, xs[i], dys[i]) for i in call_order(activations)}
            return list(results.values())

        return run

    def draw() -> tuple[list[Tensor], list[Tensor]]:
        return [a.x() for a in activations], [a.dy() for a in activations]

    variants = {"eager": variant(reference.masked_bn_act), "fastprune": variant(ops.masked_bn_act)}
    return case(f"step, {name}", draw, variants, activations, streams=6)


def case(
    name: str,
    draw: Callable[[], tuple[list[Tensor], ...]],
    variants: Mapping[str, Callable[..., object]],
    activations: list[Activation],
    *,
    streams: int,
) -> Case:
    """Return a case with the properties that all passes share."""
    nbytes = streams * sum(activation.bytes for activation in activations)
    # Eager torch rounds to bfloat16 after each of three products.
    tolerance = 2e-2 if activations[0].dtype == torch.bfloat16 else 1e-4
    return Case(
        name,
        draw,
        variants,
        bytes=nbytes,
        shape=describe(activations),
        rtol=tolerance,
        atol=tolerance / 10,
        fresh=False,
        clock="events",
        rounds=50,
    )
