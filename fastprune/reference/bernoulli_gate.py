"""Discrete gates, each open with a probability of its own."""

from torch import Tensor

from fastprune.reference.philox import random_bits
from fastprune.reference.straight_through import straight_through


def bernoulli_gate(theta: Tensor, *, seed: int, step: int | Tensor) -> Tensor:
    """``gate = 1 if u < theta else 0``, with u uniform on {0, 1, …, 2^32 - 1} / 2^32.

    The same bits, arguments and gradient as :func:`fastprune.ops.bernoulli_gate`: straight-through where theta is in
    [0, 1], 0 outside.

    Source: DMC (Gao et al., CVPR 2020), eq. 3 and 4.
    """
    u = random_bits(theta, seed, step).double() * 2.0**-32
    is_open = u < theta.double()
    inside = (theta >= 0) & (theta <= 1)  # not clamp, whose derivative at the ends is 0
    return straight_through(is_open.to(theta.dtype), theta.masked_fill(~inside, 0))
