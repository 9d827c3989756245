"""A small call of every operator, for ``fastprune doctor`` and for the tests that all operators have to pass.

With an entry here a new operator is compared with its reference, compiled, exported and tested under transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """An operator on small inputs.

    Args:
        operator: Its name in ``fastprune.ops`` and ``fastprune.reference``.
        inputs: Float32 tensors; the result is differentiated with respect to each.
        call: Calls the operator of one of these modules on the inputs.
        tolerance: The largest allowed difference, relative to the largest value.
    """

    operator: str
    inputs: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    tolerance: float = 1e-5

    def results(self, module: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the result and its gradients, in float64 on the CPU."""
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        result = self.call(module, *inputs)
        found: list[Tensor | None] = [result]
        if result.requires_grad:
            weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=result.device)
            found += torch.autograd.grad((result.flatten() * weights).sum(), inputs, allow_unused=True)
        return [tensor.detach().cpu().double() for tensor in found if tensor is not None]


def examples() -> list[Example]:
    """Return an example of every operator; the same inputs on every call."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    keep, window = torch.tensor([0.5, 0.25, 0.9]), torch.tensor([2.0, 6.0, 0.0])
    vectors = (normal(8), normal(8), (torch.arange(8) % 2).float())
    return [
        Example("topk_mask", (normal(300), keep, window), call_topk_mask),
        Example("bernoulli_gate", (normal(99) + 0.5,), lambda module, x: module.bernoulli_gate(x, seed=0, step=1)),
        Example("gumbel_gate", (normal(99),), lambda module, x: module.gumbel_gate(x, seed=0, step=1, hard=False)),
        Example("masked_bn_act", (normal(2, 8, 7, 7), *vectors), call_masked_bn_act),
        # On CUDA torch computes float32 convolutions in TF32.
        Example("masked_conv_bn_act", (normal(2, 8, 7, 7), normal(8, 8, 3, 3), *vectors), call_masked_conv, 2e-3),
        Example("group_prox_", (normal(6, 5), torch.linspace(0, 4, 6)), call_group_prox),
    ]


def call_topk_mask(module: Any, scores: Tensor, keep: Tensor, window: Tensor) -> Tensor:
    """Call ``topk_mask`` on three groups, the last one with a hard mask."""
    mask: Tensor = module.topk_mask(scores, keep, torch.tensor([0, 16, 80, 300]), window)
    return mask


def call_masked_bn_act(module: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Call ``masked_bn_act`` with frozen statistics."""
    y: Tensor = module.masked_bn_act(x, (weight, bias, *statistics_like(mask)), mask)
    return y


def call_masked_conv(module: Any, x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Call ``masked_conv_bn_act`` with a smooth activation, so that a rounding cannot flip a gradient."""
    bn = (weight, bias, *statistics_like(mask))
    y: Tensor = module.masked_conv_bn_act(x, kernel, bn, mask, padding=1, activation="silu")
    return y


def statistics_like(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and variances for as many channels as a vector has, in its dtype and on its device."""
    channels = torch.arange(vector.shape[0], dtype=vector.dtype, device=vector.device)
    return channels / 10, 1 + channels


def call_group_prox(module: Any, rows: Tensor, threshold: Tensor) -> Tensor:
    """Call ``group_prox_`` on a copy of rows, and return the norms before and the rows after it."""
    rows = rows.detach().clone()
    table = module.UnitTable([(rows, 0, torch.arange(len(rows), device=rows.device))], len(rows))
    return torch.cat([module.group_prox_(table, threshold.detach()), rows.flatten()])
