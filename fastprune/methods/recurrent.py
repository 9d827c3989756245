"""A bidirectional GRU over one sequence, for generators on the CPU: both directions are one batch.

torch runs a step of each direction as products of a vector and a matrix of their own, and in the backward pass adds up
an outer product for each. Here both directions take one batched product for a step, and the gradients of the recurrent
weights one product over all steps. For the 27 gates of ResNet-56 it takes 3.0 ms instead of 6.4 on one core,
forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Recurrence(torch.autograd.Function):
    """States h of all steps, [D, L, H], from what inputs give to gates, [D, L, 3H], and W [D, 3H, H] and b [D, 3H].

    Gates are in torch's order: reset r, update z, new n = tanh(i_n + r (W_n h + b_n)); h' = (1 − z) n + z h.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Step by step, for all directions at once."""
        directions, steps, size = *inputs.shape[:2], weight.shape[2]
        states = inputs.new_zeros(directions, steps + 1, size)
        gates, new = inputs.new_empty(directions, steps, 2 * size), inputs.new_empty(directions, steps, size)
        recurrent = inputs.new_empty(directions, steps, size)  # W_n h + b_n
        transposed = weight.transpose(1, 2).contiguous()
        for t in range(steps):
            part = torch.baddbmm(bias[:, None], states[:, t, None], transposed)[:, 0]
            gates[:, t] = (inputs[:, t, : 2 * size] + part[:, : 2 * size]).sigmoid_()
            recurrent[:, t] = part[:, 2 * size :]
            new[:, t] = torch.addcmul(inputs[:, t, 2 * size :], gates[:, t, :size], recurrent[:, t]).tanh_()
            states[:, t + 1] = torch.lerp(new[:, t], states[:, t], gates[:, t, size:])
        ctx.save_for_backward(weight, states, gates, new, recurrent)
        return states[:, 1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What does not depend on the gradient of h is made for all steps beforehand."""
        weight, states, gates, new, recurrent = ctx.saved_tensors
        directions, steps, size = new.shape
        reset, update = gates.split(size, dim=2)
        to_new = (1 - update) * (1 - new * new)
        to_reset = to_new * recurrent * reset * (1 - reset)
        to_update = (states[:, :-1] - new) * update * (1 - update)
        factors = torch.stack([to_reset, to_update, to_new * reset], dim=2)  # [D, L, 3, H]
        gradients = torch.empty_like(factors)
        arriving = torch.empty_like(new)  # gradients of h of all steps
        later = new.new_zeros(directions, size)
        for t in reversed(range(steps)):
            arriving[:, t] = upstream[:, t] + later
            gradients[:, t] = arriving[:, t, None] * factors[:, t]
            through = torch.bmm(gradients[:, t].reshape(directions, 1, 3 * size), weight)[:, 0]
            later = torch.addcmul(through, arriving[:, t], update[:, t])
        parts = gradients.view(directions, steps, 3 * size)
        weights = torch.bmm(parts.transpose(1, 2), states[:, :-1])
        inputs = torch.cat([parts[:, :, : 2 * size], arriving * to_new], dim=2)
        return inputs, weights, parts.sum(1)


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
        torch.stack([inputs[0], inputs[1].flip(0)]), torch.stack(both("weight_hh")), torch.stack(both("bias_hh"))
    )
    return torch.cat([states[0], states[1].flip(0)], dim=1)[:, None]
