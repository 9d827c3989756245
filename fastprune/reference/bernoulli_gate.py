"""Discrete gates with a straight-through gradient."""

from torch import Tensor

from fastprune.reference.philox import random_bits
from fastprune.reference.topk_mask import straight_through


def bernoulli_gate(theta: Tensor, *, seed: int, step: int | Tensor) -> Tensor:
    """What :func:`fastprune.ops.bernoulli_gate` computes, bit by bit, with the same arguments and gradient.

    Checks nothing.

    Source: DMC (Gao et al., CVPR 2020), eq. 3 and 4.
    """
    u = random_bits(theta, seed, step).double() * 2.0**-32
    is_open = u < theta.double()
    inside = (theta >= 0) & (theta <= 1)  # not clamp, whose derivative at the ends is 0
    return straight_through(is_open.to(theta.dtype), theta.masked_fill(~inside, 0))
