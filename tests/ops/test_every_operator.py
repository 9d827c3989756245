"""Properties of every operator, tested on its example; a new operator is tested here as soon as it has one."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastprune import ops, reference
from fastprune.ops.examples import Example, examples

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
EVERY = pytest.mark.parametrize("example", examples(), ids=lambda example: example.operator)
# group_prox_ changes tensors that are not its arguments: it has no gradient and breaks graphs.
FUNCTIONAL = pytest.mark.parametrize(
    "example", [e for e in examples() if e.operator != "group_prox_"], ids=lambda example: example.operator
)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    gradients = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True)
    return [result.detach(), *(gradient for gradient in gradients if gradient is not None)]


def test_every_operator_has_an_example_and_a_reference() -> None:
    assert {example.operator for example in examples()} == set(ops.__all__) - {"UnitTable"}  # group_prox_ takes one
    assert reference.__all__ == ops.__all__ == sorted(ops.__all__)


@EVERY
@DEVICES
def test_values_and_gradients_are_those_of_the_reference(example: Example, device: str) -> None:
    results = example.results(ops, [tensor.to(device) for tensor in example.inputs])
    expected = example.results(reference, [tensor.double() for tensor in example.inputs])
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=0, atol=example.tolerance * max(1, exact.abs().max().item()))


@FUNCTIONAL
@DEVICES
def test_compiles_without_a_graph_break(example: Example, device: str) -> None:
    inputs = [tensor.to(device) for tensor in example.inputs]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: example.call(ops, *given), fullgraph=True, backend="aot_eager")
    eager = with_gradients(lambda *given: example.call(ops, *given), inputs)
    for result, expected in zip(with_gradients(compiled, inputs), eager, strict=True):
        assert torch.equal(result, expected)


@FUNCTIONAL
@pytest.mark.parametrize("strict", [True, False])
def test_exports(example: Example, strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return example.call(ops, *given)

    exported = torch.export.export(Model(), example.inputs, strict=strict)
    assert torch.equal(exported.module()(*example.inputs), Model()(*example.inputs))


@EVERY
@DEVICES
def test_autocast_changes_nothing(example: Example, device: str) -> None:
    inputs = [tensor.to(device) for tensor in example.inputs]
    expected = example.call(ops, *inputs)
    with torch.autocast(device, torch.bfloat16):
        result = example.call(ops, *inputs)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@FUNCTIONAL
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda given: f(given).sum())(x),
        lambda f, x: torch.func.vjp(f, x)[0],
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.vmap(f)(x[None]),
        lambda f, x: torch.func.jacrev(f)(x),
    ],
    ids=["grad", "vjp", "jvp", "vmap", "jacrev"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch uses it itself
def test_transforms_of_torch_func_are_refused(
    example: Example, transform: Callable[[Callable[[Tensor], Tensor], Tensor], object]
) -> None:
    x, *rest = example.inputs
    message = rf"{example.operator}: got a call under a transform of torch.func .*, needs plain autograd"
    with pytest.raises(RuntimeError, match=message):
        transform(lambda given: example.call(ops, given, *rest), x)
    assert example.call(ops, *example.inputs).isfinite().all()  # and nothing of it is left behind


@EVERY
def test_documentation_runs(example: Example) -> None:
    result = doctest.testmod(sys.modules[getattr(ops, example.operator).__module__])
    assert result.attempted > 0
    assert result.failed == 0
