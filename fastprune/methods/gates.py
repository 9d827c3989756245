"""Discrete gates with a straight-through gradient (DMC, §3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Odd, so that it permutes the 32 bits that seed a CPU generator: the streams of two seeds meet far apart only.
SEED_STRIDE = 0x9E3779B1


def deterministic_gate(theta: Tensor) -> Tensor:
    """``1[θ ≥ 0.5]``, with the gradient of the identity on the closed interval [0, 1] and 0 outside.

    Args:
        theta: gate parameters, float, any shape.

    Returns:
        0 or 1, of theta's shape and dtype.

    Source: Gao et al., CVPR 2020, eq. 1 and 3.
    """
    return _StraightThrough.apply(theta, theta >= 0.5)  # type: ignore[no-any-return]


def bernoulli_gate(theta: Tensor, *, seed: int, step: int) -> Tensor:
    """1 with probability θ, else 0, with the gradient of ``deterministic_gate``.

    One draw for each gate, the same for every image of the batch and on every rank and device: it depends on
    (seed, step) only. θ = 1 is always open and θ = 0 never.

    Args:
        theta: gate parameters in [0, 1], float, any shape.
        seed: of the run.
        step: counts the draws.

    Returns:
        0 or 1, of theta's shape and dtype.

    Source: Gao et al., CVPR 2020, eq. 3 and 4.
    """
    generator = torch.Generator().manual_seed((seed * SEED_STRIDE + step) % 2**63)
    noise = torch.rand(theta.shape, generator=generator, dtype=torch.float32)  # [0, 1)
    return _StraightThrough.apply(theta, noise.to(theta.device, non_blocking=True) < theta)  # type: ignore[no-any-return]


class _StraightThrough(torch.autograd.Function):
    """``is_open`` as numbers; its gradient goes to theta where theta is in [0, 1]."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, is_open: Tensor) -> Tensor:
        ctx.save_for_backward(theta)
        return is_open.to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (theta,) = ctx.saved_tensors
        return gradient * ((theta >= 0) & (theta <= 1)), None
