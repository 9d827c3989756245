"""A bidirectional GRU over one sequence, for generators on the CPU: both directions are one batch.

torch runs a step of each direction as products of a vector and a matrix of their own, and in the backward pass adds up
an outer product for each. Here both directions take one batched product for a step, and the gradients of the recurrent
weights one product over all steps. For the 27 gates of ResNet-56 it takes 1.7 ms instead of 4.7 on one core,
forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Recurrence(torch.autograd.Function):
    """States h of all steps, [L, D, H], from what inputs give to gates, [L, D, 3H], and W [D, 3H, H] and b [D, 3H].

    Gates are in torch's order: reset r, update z, new n = tanh(i_n + r (W_n h + b_n)); h' = (1 − z) n + z h.
    Operators write into the memory of all steps, whose views are made at once: a step is so small that each call
    counts.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Step by step, for all directions at once."""
        steps, directions, size = *inputs.shape[:2], weight.shape[2]

        def memory(count: int, width: int) -> Tensor:
            return inputs.new_empty(count, directions, 1, width)

        states, parts = memory(steps + 1, size), memory(steps, 3 * size)  # parts: W h + b
        gates, new = memory(steps, 2 * size), memory(steps, size)
        states[0] = 0
        transposed, added = weight.transpose(1, 2).contiguous(), bias[:, None]
        h, part, both, n = (some.unbind() for some in (states, parts, gates, new))
        r, z = (some.unbind() for some in gates.split(size, dim=3))
        of_both, of_new = (some.unbind() for some in parts.split([2 * size, size], dim=3))
        i_both, i_new = (some.unbind() for some in inputs[:, :, None].split([2 * size, size], dim=3))
        for t in range(steps):
            torch.baddbmm(added, h[t], transposed, out=part[t])
            torch.add(i_both[t], of_both[t], out=both[t]).sigmoid_()
            torch.addcmul(i_new[t], r[t], of_new[t], out=n[t]).tanh_()
            torch.lerp(n[t], h[t], z[t], out=h[t + 1])
        ctx.save_for_backward(weight, states, gates, new, parts)
        return states[1:, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What does not depend on the gradient of h is made for all steps beforehand."""
        weight, states, gates, new, parts = ctx.saved_tensors
        steps, directions, _, size = new.shape
        reset, update = gates.split(size, dim=3)
        to_new = (1 - update) * (1 - new * new)
        to_reset = to_new * parts[..., 2 * size :] * reset * (1 - reset)
        to_update = (states[:-1] - new) * update * (1 - update)
        factors = torch.cat([to_reset, to_update, to_new * reset], dim=2)  # [L, D, 3, H]
        gradients = torch.empty_like(factors)
        rows = gradients.view(steps, directions, 1, 3 * size)
        arriving = torch.empty_like(new)  # gradients of h of all steps
        later = torch.zeros_like(new[0])
        dh, factor, gradient, row, z = (some.unbind() for some in (arriving, factors, gradients, rows, update))
        given = upstream[:, :, None].unbind()
        for t in reversed(range(steps)):
            torch.add(given[t], later, out=dh[t])
            torch.mul(dh[t], factor[t], out=gradient[t])
            torch.baddbmm(dh[t] * z[t], row[t], weight, out=later)
        by_direction = rows[:, :, 0].transpose(0, 1)
        weights = torch.bmm(by_direction.transpose(1, 2), states[:-1, :, 0].transpose(0, 1))
        inputs = torch.cat([*gradients[:, :, :2].unbind(2), (arriving * to_new)[:, :, 0]], dim=2)
        return inputs, weights, by_direction.sum(1)


def bidirectional(gru: nn.GRU, x: Tensor) -> Tensor:
    """What ``gru(x)[0]`` is, with gradients for all parameters.

    Args:
        gru: of one layer and two directions, with biases.
        x: [L, 1, inputs].

    Returns:
        [L, 1, 2H].
    """

    def both(name: str) -> list[Tensor]:
        return [getattr(gru, f"{name}_l0{direction}") for direction in ("", "_reverse")]

    sequence = x[:, 0]
    inputs = [torch.addmm(b, sequence, w.t()) for w, b in zip(both("weight_ih"), both("bias_ih"), strict=True)]
    states = Recurrence.apply(
        torch.stack([inputs[0], inputs[1].flip(0)], dim=1), torch.stack(both("weight_hh")), torch.stack(both("bias_hh"))
    )
    return torch.cat([states[:, 0], states[:, 1].flip(0)], dim=1)[:, None]
