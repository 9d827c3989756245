"""The example that a network is traced with: tensors by position and by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of one input of the traced network, and its name unless it is given by position."""

    shape: tuple[int, ...]
    dtype: str
    name: str | None = None

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return a random input: normal if real or complex, bytes for images, zeros for others (indices, masks)."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_complex:
            return torch.randn(self.shape, generator=generator, dtype=torch.complex128).to(dtype)
        if dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)
        if dtype == torch.uint8:
            return torch.randint(256, self.shape, generator=generator, dtype=dtype)
        return torch.zeros(self.shape, dtype=dtype)


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a network.

    Args:
        args: inputs by position.
        kwargs: inputs by name, in the order of the network's signature.
    """

    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All inputs, those with names last."""
        return (*self.args, *self.kwargs.values())

    @property
    def names(self) -> tuple[str | None, ...]:
        """The name of each input, None for those by position."""
        return (*(None for _ in self.args), *self.kwargs)

    @property
    def batch(self) -> int:
        """Number of samples in each input."""
        return self.tensors[0].shape[0]

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        """Shape, dtype and name of each input."""
        return tuple(
            InputSpec(tuple(x.shape), str(x.dtype).removeprefix("torch."), name)
            for x, name in zip(self.tensors, self.names, strict=True)
        )

    def map(self, change: Callable[[Tensor], Any]) -> Inputs:
        """Return the inputs with each tensor changed."""
        return Inputs(tuple(map(change, self.args)), {name: change(x) for name, x in self.kwargs.items()})

    def run(self, network: Callable[..., Any]) -> Any:
        """Return the network's results for these inputs."""
        return network(*self.args, **self.kwargs)

    @staticmethod
    def from_example(example: Example, model: nn.Module) -> Inputs:
        """Return a user's example with batches of one doubled; the exporter would take a size of 1 for a constant.

        Raises:
            TypeError: if it is no tensor and no sequence or mapping of tensors, or does not fit the model's signature.
            ValueError: if the inputs differ in their first dimension, so that a cost per sample has no meaning.
        """
        if isinstance(example, Tensor):
            inputs = Inputs((example,))
        elif isinstance(example, Mapping):
            inputs = Inputs((), sort_by_signature(example, model))
        elif isinstance(example, Sequence):
            inputs = Inputs(tuple(example))
        else:
            inputs = Inputs(())
        if not inputs.tensors or not all(isinstance(x, Tensor) and x.dim() > 0 for x in inputs.tensors):
            raise TypeError(
                f"example_inputs: got {type(example).__name__}; give a tensor with a batch dimension, a tuple of them "
                "or a dict of them by argument name"
            )
        if len({x.shape[0] for x in inputs.tensors}) > 1:
            sizes = ", ".join(str(x.shape[0]) for x in inputs.tensors)
            raise ValueError(f"example_inputs: all inputs need the same batch size in dimension 0, got {sizes}")
        bind_arguments(model, inputs)
        if inputs.batch == 1:
            inputs = inputs.map(lambda x: torch.cat([x, x]))
        return inputs.map(Tensor.detach)


def sort_by_signature(example: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Sort inputs by name into the order of the model's signature."""
    bound = bind_arguments(model, Inputs((), example))
    ordered = {name: example[name] for name in bound if name in example}
    return ordered | dict(example)


def bind_arguments(model: nn.Module, inputs: Inputs) -> Mapping[str, Any]:
    """Return the inputs by the names of the model's arguments.

    Raises:
        TypeError: if the model does not take them.
    """
    try:
        return inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError as error:
        given = sorted(inputs.kwargs) if inputs.kwargs else f"{len(inputs.args)} by position"
        advice = "" if inputs.kwargs else "; give inputs by name as a dict"
        raise TypeError(
            f"example_inputs: {type(model).__name__}.forward does not take {given}: {error}{advice}"
        ) from error
