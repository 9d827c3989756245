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
"""What each computes, in plain torch."""

BOUNDS = {"identity": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
"""Those that only bound their argument."""

DIFFERENTIABLE_BY_VALUE = tuple(BOUNDS)
"""Their derivative is a function of their value; of the others the value before the activation is saved."""


def checked_activation(activation: str | None) -> str:
    """The name, None standing for the identity.

    Raises:
        ValueError: There is no such activation.
    """
    name = "identity" if activation is None else activation
    if name not in tuple(ACTIVATIONS):  # a tuple also answers for what has no hash
        raise ValueError(f"activation: got {activation!r}, needs one of {', '.join(ACTIVATIONS)}")
    return name
