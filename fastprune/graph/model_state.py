"""The state of a model by name: parameters, buffers, attributes; and where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def has_no_values(model: nn.Module) -> bool:
    """Return whether all of a model is on the meta device."""
    tensors = state_of(model).values()
    return bool(tensors) and all(t.is_meta for t in tensors)


def attribute_of(module: nn.Module, name: str) -> Any:
    """Return a module's attribute by its dotted name."""
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def parameter_names(model: nn.Module) -> set[str]:
    """Return the names of the distinct parameters."""
    return {name for name, _ in model.named_parameters()}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Set the flags of all modules to eval mode, without calls of ``train``, and put them back."""
    flags = {module: module.training for model in models for module in model.modules()}
    for module in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training
