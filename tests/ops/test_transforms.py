"""Operators with a gradient of their own refuse the transforms of torch.func, by name, rather than mislead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastprune import ops

STATISTICS = (torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4))
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli_gate": lambda mask: ops.bernoulli_gate(mask, seed=0, step=0),
    "gumbel_gate": lambda mask: ops.gumbel_gate(mask, seed=0, step=0),
    "masked_bn_act": lambda mask: ops.masked_bn_act(torch.ones(2, 4, 3, 3), STATISTICS, mask),
    "masked_conv_bn_act": lambda mask: ops.masked_conv_bn_act(
        torch.ones(2, 3, 3, 3), torch.ones(4, 3, 1, 1), STATISTICS, mask
    ),
    "topk_mask": lambda mask: ops.topk_mask(mask, torch.tensor([0.5]), torch.tensor([0, 4])),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_grad_and_vmap_are_refused(name):
    operator = OPERATORS[name]
    message = rf"{name}: got a call under a transform of torch.func"
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda mask: operator(mask).sum())(torch.rand(4))
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(operator)(torch.rand(2, 4))
    assert operator(torch.rand(4)) is not None
