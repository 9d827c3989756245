"""What a network is traced with: tensors by position and by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a network.

    Args:
        args: by position.
        kwargs: by name, in the order of the network's signature.
    """

    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, those with names last."""
        return (*self.args, *self.kwargs.values())

    @property
    def names(self) -> tuple[str | None, ...]:
        """The name of each, None for those by position."""
        return (*(None for _ in self.args), *self.kwargs)

    @property
    def batch(self) -> int:
        """Samples in each of them."""
        return self.tensors[0].shape[0]

    def map(self, change: Callable[[Tensor], Any]) -> Inputs:
        """The same with each tensor changed."""
        return Inputs(tuple(map(change, self.args)), {name: change(x) for name, x in self.kwargs.items()})

    def given_to(self, network: Callable[..., Any]) -> Any:
        """What a network returns for them."""
        return network(*self.args, **self.kwargs)

    @staticmethod
    def of(example: Example, model: nn.Module) -> Inputs:
        """A user's example, with batches of one doubled (an exporter takes a size of 1 for a constant).

        Raises:
            TypeError: if it is no tensor and no sequence or mapping of tensors, or does not fit the model's signature.
            ValueError: if the inputs differ in their first dimension, so that a cost per sample has no meaning.
        """
        if isinstance(example, Tensor):
            inputs = Inputs((example,))
        elif isinstance(example, Mapping):
            inputs = Inputs((), in_order(example, model))
        elif isinstance(example, Sequence):
            inputs = Inputs(tuple(example))
        else:
            inputs = Inputs(())
        if not inputs.tensors or not all(isinstance(x, Tensor) and x.dim() > 0 for x in inputs.tensors):
            raise TypeError(
                "example_inputs: a tensor with a batch dimension, a tuple of them or a dict of them by argument name "
                f"is needed, got {type(example).__name__}"
            )
        if len({x.shape[0] for x in inputs.tensors}) > 1:
            sizes = ", ".join(str(x.shape[0]) for x in inputs.tensors)
            raise ValueError(f"example_inputs: all inputs need the same batch size in dimension 0, got {sizes}")
        bound_to(model, inputs)
        if inputs.batch == 1:
            inputs = inputs.map(lambda x: torch.cat([x, x]))
        return inputs.map(Tensor.detach)


def in_order(example: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Inputs by name in the order of the model's signature."""
    bound = bound_to(model, Inputs((), example))
    ordered = {name: example[name] for name in bound if name in example}
    return ordered | dict(example)


def bound_to(model: nn.Module, inputs: Inputs) -> Mapping[str, Any]:
    """Inputs by the names of the arguments that take them.

    Raises:
        TypeError: if the model does not take them.
    """
    try:
        return inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError as error:
        given = sorted(inputs.kwargs) if inputs.kwargs else f"{len(inputs.args)} by position"
        advice = "" if inputs.kwargs else "; inputs by name are given as a dict"
        raise TypeError(
            f"example_inputs: {type(model).__name__}.forward does not take {given}: {error}{advice}"
        ) from error
