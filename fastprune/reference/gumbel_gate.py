"""Relaxed gates: sigmoids of noisy logits."""

import torch
from torch import Tensor

from fastprune.reference.philox import random_bits
from fastprune.reference.straight_through import straight_through


def gumbel_gate(
    logits: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    temperature: float = 0.4,
    base: float = 3.0,
    hard: bool = True,
    noise: str = "gumbel",
) -> Tensor:
    """``y = sigmoid((logits + base + e) / temperature)``; the gate is 1 if y ≥ 1/2 else 0 if ``hard``, else y.

    The noise e is -ln(-ln u) for "gumbel", ln u - ln(1 - u) for "logistic", and 0 for "none", with u in (0, 1); it is
    drawn in float64. The same arguments and gradient as :func:`fastprune.ops.gumbel_gate`: that of y, also if ``hard``.

    Source: the releases of DDNP and SANP; Maddison et al. (ICLR 2017) for logistic noise.
    """
    u = (random_bits(logits, seed, step).double() + 0.5) * 2.0**-32
    if noise == "gumbel":
        sample = -torch.log(-torch.log(u))
    elif noise == "logistic":
        sample = torch.log(u) - torch.log1p(-u)
    else:
        sample = torch.zeros_like(u)
    soft = torch.sigmoid((logits + base + sample.to(logits.dtype)) / temperature)
    return straight_through((soft >= 0.5).to(soft.dtype), soft) if hard else soft
