"""The activations that the kernels know, by their names."""

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
"""Each activation in plain torch."""

BOUNDS = {"identity": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
"""Lower and upper bound of the activations that do nothing else but bound their argument."""

DIFFERENTIABLE_BY_VALUE = tuple(BOUNDS)
"""Activations whose derivative is a function of their value; for the others the argument is saved."""


def check_activation(activation: str | None) -> str:
    """Return the activation's name; None is the identity.

    Raises:
        ValueError: There is no such activation.
    """
    name = "identity" if activation is None else activation
    if name not in tuple(ACTIVATIONS):  # a tuple also answers for objects without a hash
        raise ValueError(f"activation: got {activation!r}, needs one of {', '.join(ACTIVATIONS)}")
    return name
