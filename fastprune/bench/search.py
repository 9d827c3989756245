"""The search step of DMC and of DDNP, as users run it, beside the same method in plain PyTorch.

``fastprune`` is the method itself: its ``setup`` on a task, then its phase's ``step`` on made-up batches, on CUDA under
autocast to bfloat16, as the engine has it. ``eager`` is :mod:`fastprune.bench.eager_search`. Both go on from the same
parameters, as they may be in the middle of a search: DMC's θ are uniform in [0, 1], and DDNP's widths are so far down
that the cost term still pulls. Losses and gradients of the first step have to agree, or no time is told.

``outside`` is our step without the network: its call is replaced by one that returns constant scores and constant
gradients of the gates. Its ratio is the share of the step that masks, generators, costs and the optimiser take.

``peak memory`` is what a step allocates at most on top of what was there before, ours over eager's; ``all memory`` the
same together with what is always there: the network's weights, folded and packed copies of them, and what the optimiser
keeps. See :mod:`fastprune.bench.memory`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastprune.bench.case import Case
from fastprune.bench.eager_search import EagerDDNP, EagerDMC, Flops, gradients_of
from fastprune.bench.memory import Memory, memory_of
from fastprune.bench.step import TOLERANCE, Floor, Network, Plain, networks, prepared
from fastprune.engine import Placement
from fastprune.graph import ChannelGraph, trace
from fastprune.methods.contract import Task
from fastprune.methods.gates.ddnp import DDNP
from fastprune.methods.gates.dmc import DMC
from fastprune.methods.gates.gated import GateSearch
from fastprune.planning.budget import Budget
from fastprune.reference.philox import random_bits

PART = 0.5  # of the multiply-accumulates that may stay
LOWERED = 1.5  # logits: widths then are about 0.82, and the cost 0.7, which is above the budget

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From images and labels; returns the losses and the gradients that it followed."""


class Ours:
    """A method's own step, on a model of its own.

    Args:
        graph: of the network.
        model: the network; its weights take gradients outside of the search, as users' do.
        placement: where and how it runs.
    """

    kind: ClassVar[type[GateSearch]]
    peer: ClassVar[type[EagerDMC | EagerDDNP]]
    method: Any

    def __init__(self, graph: ChannelGraph, model: nn.Module, placement: Placement) -> None:
        self.placement = placement
        model = copy.deepcopy(model).requires_grad_()
        budget = Budget("flops", PART)
        self.task = Task(model=model, graph=graph, budget=budget, device=placement.device)
        self.method = self.kind()
        self.method.setup(self.task)
        with torch.no_grad():
            self.go_on()
        (phase,) = self.method.phases(self.task)
        self.step = phase.step

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Do a step; returns the losses by the peer's ``names`` and the gradients that it followed."""
        with self.placement.autocast():
            metrics = self.step(images, labels)
        return *(metrics[name].float() for name in self.peer.names), *self.gradients()

    def without_network(self, scores: Tensor) -> Ours:
        """The same with constants for the network's scores and for its gates' gradients."""
        self.method.masked = Constants(scores, self.task.graph.num_units)
        return self

    def go_on(self) -> None:
        """Take the parameters to the middle of a search."""
        raise NotImplementedError

    def gradients(self) -> tuple[Tensor, ...]:
        """Those that the last step has followed."""
        raise NotImplementedError

    def eager(self, network: Plain, flops: Flops) -> Step:
        """The peer, from the same parameters."""
        raise NotImplementedError


class OursDMC(Ours):
    """DMC."""

    kind, peer = DMC, EagerDMC

    def go_on(self) -> None:
        """Gates of every probability."""
        theta = self.method.theta
        theta.copy_(torch.rand(len(theta), generator=torch.Generator().manual_seed(1)))

    def gradients(self) -> tuple[Tensor, ...]:
        """Of θ."""
        return (self.method.theta.grad,)

    def eager(self, network: Plain, flops: Flops) -> Step:
        """The first step's gates are drawn with the numbers that ours draws with."""
        theta = self.method.theta.detach()
        noise = random_bits(theta, self.task.seed, self.method.step).double() * 2.0**-32
        return EagerDMC(network, flops, theta, noise, self.placement.autocast)


class OursDDNP(Ours):
    """DDNP."""

    kind, peer = DDNP, EagerDDNP

    def go_on(self) -> None:
        """Narrower than in the beginning."""
        widths = self.method.widths
        widths.linear.weight -= LOWERED * widths.input / widths.input.square().sum()

    def gradients(self) -> tuple[Tensor, ...]:
        """Of both generators, in the peer's order: its heads are layers of their own."""
        scores = self.method.scores
        heads = scores.heads.grad.split(scores.sizes)
        return *gradients_of(scores.between), *gradients_of(scores.norm), *heads, *gradients_of(self.method.widths)

    def eager(self, network: Plain, flops: Flops) -> Step:
        """Generators with the same inputs and parameters."""
        states = self.method.scores.state_dict(), self.method.widths.state_dict()
        return EagerDDNP(network, flops, *states, self.placement.autocast)


METHODS: dict[str, type[Ours]] = {"dmc": OursDMC, "ddnp": OursDDNP}
"""Those whose steps are timed, by name."""


class Constants:
    """In place of the masked network."""

    def __init__(self, scores: Tensor, units: int) -> None:
        self.scores, self.gradient = scores, 1e-3 * torch.randn(units, device=scores.device)

    def __call__(self, images: Tensor, gates: Tensor) -> Tensor:
        """Constant scores [N, classes] whose gradient of the gates [U] is constant, too."""
        return _Constant.apply(gates, self.scores, self.gradient)  # type: ignore[no-any-return]


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None, None


def cases(
    device: torch.device, *, quick: bool = False, only: Sequence[str] = tuple(METHODS), processor_time: bool = False
) -> Iterator[Case]:
    """Both methods on ResNet-56 and ResNet-50."""
    placement = Placement(device, "bf16" if device.type == "cuda" else "float32")
    for name, (make, batch, side) in networks(device, quick=quick).items():
        model = prepared(make(), device, torch.float32)
        graph = trace(model, torch.zeros(1, 3, side, side, device=device))
        for method in only:
            found = case(method, name, model, graph, batch, side, placement)
            yield replace(found, clock="processor") if processor_time else found


def case(
    method: str, name: str, model: nn.Module, graph: ChannelGraph, batch: int, side: int, placement: Placement
) -> Case:
    """A step of one method on one network."""
    device = placement.device
    plain = plain_networks(model, device)
    flops = Flops(next(iter(plain.values())).network, torch.zeros(1, 3, side, side, device=device), PART)
    classes = int(model.fc.out_features)  # type: ignore[union-attr, arg-type]

    def draw() -> tuple[Tensor, Tensor]:
        images = torch.randn(batch, 3, side, side, device=device)
        return images, torch.randint(classes, (batch,), device=device)

    def ours() -> Ours:
        return METHODS[method](graph, model, placement)

    def more() -> dict[str, Any]:
        arguments = draw()
        memory = {kind: memory_of(ours().eager(network, flops), arguments, device) for kind, network in plain.items()}
        return compared({**memory, "fastprune": memory_of(ours(), arguments, device)}, weights_of(model))

    mine = ours()
    gates = next(iter(plain.values())).network.gates
    variants: dict[str, Callable[..., Any]] = {kind: mine.eager(network, flops) for kind, network in plain.items()}
    variants["outside"] = ours().without_network(torch.randn(batch, classes, device=device))
    variants["fastprune"] = mine
    nbytes, operations = least_work(model, draw()[0])
    return Case(
        f"{method}, {name}, batch {batch}",
        draw,
        variants,
        bytes=nbytes,
        flops=operations,
        precision="bfloat16" if placement.precision == "bf16" else "float32",
        shape={"method": method, "network": name, "batch": batch, "side": side, "gates": sum(gates)},
        samples=batch,
        groups=(method,),
        norm=TOLERANCE[torch.bfloat16 if placement.precision == "bf16" else torch.float32],
        unchecked=("outside",),
        rounds=30,
        seconds=8.0 if device.type == "cuda" else 40.0,
        more=more,
    )


def plain_networks(model: nn.Module, device: torch.device) -> dict[str, Plain]:
    """Peers' networks by what the peer is called; on CUDA in channels_last only, which is the faster one there."""
    last = Network(copy.deepcopy(model).to(memory_format=torch.channels_last))
    found = {"eager channels_last": Plain(last, torch.channels_last)}
    return found if device.type == "cuda" else {"eager": Plain(Network(model), torch.contiguous_format), **found}


def least_work(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Bytes and operations of the network with all gates open, forward and backward to the gates."""
    network = Network(copy.deepcopy(model).to("meta"))
    return Floor(network, network.gates, images.to("meta")).work()


def weights_of(model: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def compared(memory: Mapping[str, Memory], weights: int) -> dict[str, Any]:
    """What the memory of a step comes to, ours over the first peer's, and the bytes behind that."""
    first, ours = memory[next(iter(memory))], memory["fastprune"]
    return {
        "peak memory": ours.peak / first.peak,
        "all memory": (weights + ours.kept + ours.peak) / (weights + first.kept + first.peak),
        "bytes": {"weights": weights, **{kind: asdict(found) for kind, found in memory.items()}},
    }
