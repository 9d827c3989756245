"""A bidirectional GRU over one sequence, for generators on the CPU, with both directions in one batch.

torch runs a step of each direction as its own products of a vector and a matrix, and adds up an outer product for each
in the backward pass. Here a step is one batched product for both directions, and the gradient of the recurrent weights
is one product over all steps. For the 27 gates of ResNet-56, forward and backward take 1.7 ms instead of 4.7 on one
core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Recurrence(torch.autograd.Function):
    """States h of all steps, [L, D, H], from the inputs' part of the gates, [L, D, 3H], and W [D, 3H, H], b [D, 3H].

    Gates are in torch's order: reset r, update z, new n = tanh(i_n + r (W_n h + b_n)); h' = (1 − z) n + z h.
    Operators write into one memory for all steps, and its views are made at once: steps are so small that each call
    counts.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Run step by step, all directions at once."""
        steps, directions, size = *inputs.shape[:2], weight.shape[2]

        def allocate(count: int, width: int) -> Tensor:
            return inputs.new_empty(count, directions, 1, width)

        states, parts = allocate(steps + 1, size), allocate(steps, 3 * size)  # parts: W h + b
        gates, new = allocate(steps, 2 * size), allocate(steps, size)
        states[0] = 0
        transposed, added = weight.transpose(1, 2).contiguous(), bias[:, None]
        h, part, both, n = (memory.unbind() for memory in (states, parts, gates, new))
        r, z = (memory.unbind() for memory in gates.split(size, dim=3))
        h_both, h_new = (memory.unbind() for memory in parts.split([2 * size, size], dim=3))
        i_both, i_new = (memory.unbind() for memory in inputs[:, :, None].split([2 * size, size], dim=3))
        for t in range(steps):
            torch.baddbmm(added, h[t], transposed, out=part[t])
            torch.add(i_both[t], h_both[t], out=both[t]).sigmoid_()
            torch.addcmul(i_new[t], r[t], h_new[t], out=n[t]).tanh_()
            torch.lerp(n[t], h[t], z[t], out=h[t + 1])
        ctx.save_for_backward(weight, states, gates, new, parts)
        return states[1:, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run backwards; the factors that do not depend on the gradient of h are computed for all steps at once."""
        weight, states, gates, new, parts = ctx.saved_tensors
        steps, directions, _, size = new.shape
        reset, update = gates.split(size, dim=3)
        to_new = (1 - update) * (1 - new * new)
        to_reset = to_new * parts[..., 2 * size :] * reset * (1 - reset)
        to_update = (states[:-1] - new) * update * (1 - update)
        factors = torch.cat([to_reset, to_update, to_new * reset], dim=2)  # [L, D, 3, H]
        gradients = torch.empty_like(factors)
        rows = gradients.view(steps, directions, 1, 3 * size)
        d_states = torch.empty_like(new)  # gradients of h of all steps
        later = torch.zeros_like(new[0])
        dh, factor, gradient, row, z = (memory.unbind() for memory in (d_states, factors, gradients, rows, update))
        above = upstream[:, :, None].unbind()
        for t in reversed(range(steps)):
            torch.add(above[t], later, out=dh[t])
            torch.mul(dh[t], factor[t], out=gradient[t])
            torch.baddbmm(dh[t] * z[t], row[t], weight, out=later)
        by_direction = rows[:, :, 0].transpose(0, 1)
        weights = torch.bmm(by_direction.transpose(1, 2), states[:-1, :, 0].transpose(0, 1))
        inputs = torch.cat([*gradients[:, :, :2].unbind(2), (d_states * to_new)[:, :, 0]], dim=2)
        return inputs, weights, by_direction.sum(1)


def run_gru(gru: nn.GRU, x: Tensor) -> Tensor:
    """Compute ``gru(x)[0]``, with gradients for all parameters.

    Args:
        gru: a GRU of one layer and two directions, with biases.
        x: the sequence, [L, 1, inputs].

    Returns:
        The states of both directions, [L, 1, 2H].
    """

    def both_directions(name: str) -> list[Tensor]:
        return [getattr(gru, f"{name}_l0{direction}") for direction in ("", "_reverse")]

    sequence = x[:, 0]
    inputs = [
        torch.addmm(b, sequence, w.t())
        for w, b in zip(both_directions("weight_ih"), both_directions("bias_ih"), strict=True)
    ]
    states = Recurrence.apply(
        torch.stack([inputs[0], inputs[1].flip(0)], dim=1),
        torch.stack(both_directions("weight_hh")),
        torch.stack(both_directions("bias_hh")),
    )
    return torch.cat([states[:, 0], states[:, 1].flip(0)], dim=1)[:, None]
