"""The search step of DMC and of DDNP, with ``variant=paper``, beside the same method in plain PyTorch.

``fastprune`` is the method itself: its ``setup`` on a task, then its phase's ``step`` on random batches, on CUDA under
autocast to bfloat16, as in the engine. ``eager`` is :mod:`fastprune.bench.eager_search`. Both start from the same
parameters, typical of the middle of a search: DMC's θ are uniform in [0, 1], and DDNP's widths still exceed the budget,
so that the cost term pulls. Losses and gradients of the first step must agree before anything is timed.

``outside`` is our step without the network: a stand-in returns constant scores and constant gradients of the gates. Its
ratio is the share of the step that masks, generators, costs and the optimiser take.

``peak memory`` is the most that a step allocates on top of the memory before it, ours over eager's. ``all memory`` adds
the permanent memory to both: the network's weights, folded and packed copies of them, and the optimiser's state. See
:mod:`fastprune.bench.memory`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastprune.bench.case import Case
from fastprune.bench.eager_search import EagerDDNP, EagerDMC, Flops, gradients_of
from fastprune.bench.memory import Memory, memory_of
from fastprune.bench.step import TOLERANCE, Floor, Network, Plain, draw_batch, networks, prepare
from fastprune.engine import Placement
from fastprune.graph import ChannelGraph, trace
from fastprune.methods.contract import Task
from fastprune.methods.gates.ddnp import DDNP
from fastprune.methods.gates.dmc import DMC
from fastprune.methods.gates.gated import GateSearch
from fastprune.planning.budget import Budget
from fastprune.reference.philox import random_bits

KEEP_RATIO = 0.5  # of the multiply-accumulates
LOWERING = 1.5  # logits: makes widths about 0.82 and the cost 0.7, which is above the budget

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Takes images and labels and returns the losses and the gradients that the step followed."""


class Ours:
    """A method's own step on a copy of the model.

    Args:
        graph: channel graph of the network.
        model: the network; its weights take gradients outside the search, as in a user's model.
        placement: device, precision and memory layout.
    """

    kind: ClassVar[type[GateSearch]]
    peer: ClassVar[type[EagerDMC | EagerDDNP]]
    method: Any

    def __init__(self, graph: ChannelGraph, model: nn.Module, placement: Placement) -> None:
        self.placement = placement
        model = copy.deepcopy(model).requires_grad_()
        budget = Budget("flops", KEEP_RATIO)
        self.task = Task(model=model, graph=graph, budget=budget, device=placement.device)
        self.method = self.kind(self.kind.Config(variant="paper"))
        self.method.setup(self.task)
        with torch.no_grad():
            self.advance()
        (phase,) = self.method.phases(self.task)
        self.step = phase.step

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Do a step and return the losses in ``peer.names`` and the gradients that it followed."""
        with self.placement.autocast():
            metrics = self.step(images, labels)
        return *(metrics[name].float() for name in self.peer.names), *self.gradients()

    def replace_network(self, scores: Tensor) -> Ours:
        """Replace the network by constant scores and constant gradients of gates, and return the step."""
        self.method.replayed = Constants(scores, self.task.graph.num_units)
        return self

    def advance(self) -> None:
        """Set the parameters to values from the middle of a search."""
        raise NotImplementedError

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the gradients that the last step followed."""
        raise NotImplementedError

    def make_peer(self, network: Plain, flops: Flops) -> Step:
        """Return the peer with the same parameters."""
        raise NotImplementedError


class OursDMC(Ours):
    """DMC."""

    kind, peer = DMC, EagerDMC

    def advance(self) -> None:
        """Set gates of all probabilities."""
        theta = self.method.theta
        theta.copy_(torch.rand(len(theta), generator=torch.Generator().manual_seed(1)))

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the gradient of θ."""
        return (self.method.theta.grad,)

    def make_peer(self, network: Plain, flops: Flops) -> Step:
        """Return the peer, which draws its first gates with the same random numbers."""
        theta = self.method.theta.detach()
        noise = random_bits(theta, self.task.seed, self.method.step).double() * 2.0**-32
        return EagerDMC(network, flops, theta, noise, self.placement.autocast)


class OursDDNP(Ours):
    """DDNP."""

    kind, peer = DDNP, EagerDDNP

    def advance(self) -> None:
        """Set narrower widths than at the start."""
        widths = self.method.widths
        widths.linear.weight -= LOWERING * widths.input / widths.input.square().sum()

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the gradients of both generators in the order of the peer, which has a layer for each head."""
        scores = self.method.scores
        heads = scores.heads.grad.split(scores.sizes)
        return *gradients_of(scores.between), *gradients_of(scores.norm), *heads, *gradients_of(self.method.widths)

    def make_peer(self, network: Plain, flops: Flops) -> Step:
        """Return the peer, with generators of the same inputs and parameters."""
        states = self.method.scores.state_dict(), self.method.widths.state_dict()
        return EagerDDNP(network, flops, *states, self.placement.autocast)


METHODS: dict[str, type[Ours]] = {"dmc": OursDMC, "ddnp": OursDDNP}
"""Methods with timed steps, by name."""


class Constants:
    """A stand-in for the masked network."""

    def __init__(self, scores: Tensor, units: int) -> None:
        self.scores, self.gradient = scores, 1e-3 * torch.randn(units, device=scores.device)

    def under(self, gates: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a network of constant scores [N, classes] with a constant gradient of the gates [U]."""
        return lambda _: cast("Tensor", _Constant.apply(gates, self.scores, self.gradient))


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
    """Yield both methods on ResNet-56 and ResNet-50."""
    placement = Placement(device, "bf16" if device.type == "cuda" else "float32")
    for name, (make, batch, side) in networks(device, quick=quick).items():
        model = prepare(make(), device, torch.float32)
        graph = trace(model, torch.zeros(1, 3, side, side, device=device))
        for method in only:
            result = case(method, name, model, graph, batch, side, placement)
            yield replace(result, clock="processor") if processor_time else result


def case(
    method: str, name: str, model: nn.Module, graph: ChannelGraph, batch: int, side: int, placement: Placement
) -> Case:
    """Return the case of a step of one method on one network."""
    device = placement.device
    plain = plain_networks(model, device)
    network = next(iter(plain.values())).network
    flops = Flops(network, torch.zeros(1, 3, side, side, device=device), KEEP_RATIO)
    classes = int(model.fc.out_features)  # type: ignore[union-attr, arg-type]
    draw = partial(draw_batch, batch, side, classes, device)
    ours = partial(METHODS[method], graph, model, placement)

    def more() -> dict[str, Any]:
        arguments = draw()
        memory = {kind: memory_of(ours().make_peer(peer, flops), arguments, device) for kind, peer in plain.items()}
        return compare_memory({**memory, "fastprune": memory_of(ours(), arguments, device)}, weights_of(model))

    mine = ours()
    variants: dict[str, Callable[..., Any]] = {kind: mine.make_peer(peer, flops) for kind, peer in plain.items()}
    variants["outside"] = ours().replace_network(torch.randn(batch, classes, device=device))
    variants["fastprune"] = mine
    nbytes, operations = least_work(model, draw()[0])
    return Case(
        f"{method}, {name}, batch {batch}",
        draw,
        variants,
        bytes=nbytes,
        flops=operations,
        precision="bfloat16" if placement.precision == "bf16" else "float32",
        shape={"method": method, "network": name, "batch": batch, "side": side, "gates": sum(network.gates)},
        samples=batch,
        groups=(method,),
        norm=TOLERANCE[torch.bfloat16 if placement.precision == "bf16" else torch.float32],
        unchecked=("outside",),
        rounds=30,
        seconds=8.0 if device.type == "cuda" else 40.0,
        more=more,
    )


def plain_networks(model: nn.Module, device: torch.device) -> dict[str, Plain]:
    """Return the networks of the peers, by name; on CUDA only in channels_last, which is faster there."""
    last = Network(copy.deepcopy(model).to(memory_format=torch.channels_last))
    peers = {"eager channels_last": Plain(last, torch.channels_last)}
    return peers if device.type == "cuda" else {"eager": Plain(Network(model), torch.contiguous_format), **peers}


def least_work(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return bytes and operations of the network with all gates open, forward and backward to the gates."""
    network = Network(copy.deepcopy(model).to("meta"))
    return Floor(network, network.gates, images.to("meta")).work()


def weights_of(model: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def compare_memory(memory: Mapping[str, Memory], weights: int) -> dict[str, Any]:
    """Return the ratios of our memory to the first peer's, and the bytes of all."""
    first, ours = memory[next(iter(memory))], memory["fastprune"]
    return {
        "peak memory": ours.peak / first.peak,
        "all memory": (weights + ours.kept + ours.peak) / (weights + first.kept + first.peak),
        "bytes": {"weights": weights, **{kind: asdict(found) for kind, found in memory.items()}},
    }
