"""The GRU of generators on the CPU computes what torch's does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastprune.methods.gates.generators import GateProducts, ScoreGenerator
from fastprune.methods.gates.recurrent import Recurrence, run_gru


@pytest.mark.parametrize("steps", [1, 2, 27])
def test_values_and_gradients_equal_torchs(steps: int) -> None:
    torch.manual_seed(steps)
    gru = nn.GRU(6, 5, bidirectional=True).double()
    x = torch.randn(steps, 1, 6, dtype=torch.float64, requires_grad=True)
    expected, found = gru(x)[0], run_gru(gru, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    upstream = torch.randn_like(expected)
    inputs = [x, *gru.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_gradients_equal_finite_differences() -> None:
    torch.manual_seed(0)
    shapes = ((4, 2, 9), (2, 9, 3), (2, 9))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(Recurrence.apply, inputs)


def test_products_of_each_gate_and_their_gradients() -> None:
    torch.manual_seed(0)
    features, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 13))
    found = GateProducts.apply(features, weight, (4, 7, 2))
    owner = torch.tensor([0] * 4 + [1] * 7 + [2] * 2)
    torch.testing.assert_close(found, (weight * features[owner]).sum(1))
    assert torch.autograd.gradcheck(lambda f, w: GateProducts.apply(f, w, (4, 7, 2)), (features, weight))


def test_the_generator_runs_on_this_gru() -> None:
    generator = ScoreGenerator([4, 7, 2], "gru", seed=1)
    assert isinstance(generator.between, nn.GRU)
    features = torch.relu(generator.norm(generator.between(generator.input)[0]))[:, 0]
    heads = generator.heads.split([4, 7, 2])
    expected = torch.cat([head @ row for head, row in zip(heads, features, strict=True)]) * generator.scale
    found = generator()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert "Recurrence" in function_names(found.grad_fn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(generator(), found)


def function_names(node: object) -> str:
    """List the names of all autograd functions of a tensor."""
    waiting, seen = [node], []
    while waiting:
        function = waiting.pop()
        seen.append(type(function).__name__)
        waiting += [after for after, _ in getattr(function, "next_functions", ()) if after is not None]
    return " ".join(seen)
