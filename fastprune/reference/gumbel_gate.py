"""Relaxed gates from noisy logits."""

import torch
from torch import Tensor

from fastprune.reference.philox import random_bits
from fastprune.reference.topk_mask import straight_through


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
    """What :func:`fastprune.ops.gumbel_gate` computes, with the same arguments and gradient.

    Draws the noise in float64, computes the gate in the dtype of ``logits`` and checks nothing.

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
