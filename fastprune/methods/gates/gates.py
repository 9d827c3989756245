"""The deterministic gate (DMC, §3.2); the stochastic one is :func:`fastprune.ops.bernoulli_gate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def deterministic_gate(theta: Tensor) -> Tensor:
    """Compute ``1[θ ≥ 0.5]``, with the gradient of the identity on the closed interval [0, 1] and 0 outside.

    Args:
        theta: gate parameters, float, any shape.

    Returns:
        0 or 1, in theta's shape and dtype.

    Source: Gao et al., CVPR 2020, eq. 1 and 3.
    """
    return straight_through(theta, theta >= 0.5)


def straight_through(theta: Tensor, is_open: Tensor) -> Tensor:
    """Return ``is_open`` as numbers, with the gradient of the identity in θ where θ is in [0, 1] and 0 outside."""
    return _StraightThrough.apply(theta, is_open)  # type: ignore[no-any-return]


class _StraightThrough(torch.autograd.Function):
    """``is_open`` as numbers, whose gradient passes to theta where theta is in [0, 1]."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, is_open: Tensor) -> Tensor:
        ctx.save_for_backward(theta)
        return is_open.to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (theta,) = ctx.saved_tensors
        return gradient * ((theta >= 0) & (theta <= 1)), None
