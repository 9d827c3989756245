"""The stochastic gates, forward and backward, beside torch's operators.

``reference`` is fastprune.reference, which draws the same numbers as the kernels. ``eager`` draws other numbers with
torch.bernoulli or torch.rand, so it is not compared; it passes the gradient straight through with as few operators as
torch allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastprune import ops, reference
from fastprune.bench.case import Case
from fastprune.bench.shapes import RESNET50_GROUPS

Gate = Callable[[Tensor, int], Tensor]

SWEEP = [1_000, 100_000, 1_000_000]


def eager_bernoulli(theta: Tensor, _: int) -> Tensor:
    """Draw with torch.bernoulli; the gradient is that of the clamp."""
    inside = theta.clamp(0, 1)
    return torch.bernoulli(inside).sub_(inside.detach()).detach() + inside


def eager_gumbel(logits: Tensor, _: int) -> Tensor:
    """Compute the hard Gumbel sigmoid as the papers' released code does."""
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-10, 1 - 2**-24)))
    soft = torch.sigmoid((logits + 3 + noise) / 0.4)
    return (soft >= 0.5).to(soft.dtype).sub_(soft.detach()) + soft


GATES: dict[str, dict[str, Gate]] = {
    "bernoulli_gate": {
        "reference": lambda theta, step: reference.bernoulli_gate(theta, seed=0, step=step),
        "eager": eager_bernoulli,
        "fastprune": lambda theta, step: ops.bernoulli_gate(theta, seed=0, step=step),
    },
    "gumbel_gate": {
        "reference": lambda logits, step: reference.gumbel_gate(logits, seed=0, step=step),
        "eager": eager_gumbel,
        "fastprune": lambda logits, step: ops.gumbel_gate(logits, seed=0, step=step),
    },
}


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """Yield both gates on ResNet-50's units and on vectors of many sizes."""
    vectors = {"ResNet-50": sum(RESNET50_GROUPS), **{f"{units:,} units": units for units in SWEEP}}
    for gate in GATES:
        for name, units in {"100 units": 100}.items() if quick else vectors.items():
            yield case(gate, name, units, device)


def case(gate: str, name: str, units: int, device: torch.device) -> Case:
    """Return the case of one gate on one vector; every step draws the vector and the noise anew."""
    steps = itertools.count()

    def draw() -> tuple[Tensor, Tensor, int]:
        values = torch.rand(units, device=device)
        values = values if gate == "bernoulli_gate" else 4 * values - 5  # half of them open
        return values.requires_grad_(), torch.randn(units, device=device), next(steps)

    return Case(
        f"{gate}, {name}",
        draw,
        {variant: gate_and_gradient(function) for variant, function in GATES[gate].items()},
        bytes=20 * units,  # forward reads values and writes gates; backward reads values and dy and writes a gradient
        shape={"units": units},
        units=units,
        groups=(gate,),
        norm=2e-3,  # rounding may flip one gate of a million
        unchecked=("eager",),
    )


def gate_and_gradient(gate: Gate) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """Return a function that computes the gates and the gradient of their input."""

    def compute(values: Tensor, dy: Tensor, step: int) -> tuple[Tensor, Tensor]:
        result = gate(values, step)
        return result.detach(), torch.autograd.grad(result, values, dy)[0]

    return compute
