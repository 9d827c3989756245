"""The state of a model: its parameters and buffers by name, and its mode, which is restored after use."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.graph.export.refusals import TraceError


@contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put ``model`` into train or eval mode, then restore it: modes, flags, values and the attributes of its modules.

    A model's own ``train`` may freeze parameters or merge some into others, and its code or hooks may keep tensors that
    they see, which have no values while the model is traced. So its ``train`` is called again to undo what it did, and
    what still differs then (rounded sums) is restored.

    Raises:
        TraceError: if its parameters have other names in one mode than in the other; names the module.
    """
    modes = [(module, module.training) for module in model.modules()]
    snapshot = Snapshot(model)
    names = saved_names(model)
    try:
        model.train(training)
        require_names(model, names, saved_names(model))
        yield
    finally:
        try:
            for module, was in modes:  # the outer ones first: their ``train`` also sets the inner ones
                if module is model or module.training != was:
                    module.train(was)
        finally:
            snapshot.restore()


class Snapshot:
    """The attributes of a model's modules (lists and dicts too), tensors and flags, to be restored.

    Values are copied only if a module has a ``train`` of its own; other code does not change them without computing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.attributes = [(module, dict(module.__dict__)) for module in model.modules()]
        values = [item for _, attributes in self.attributes for item in attributes.items()]
        self.containers = [v for name, v in values if type(v) in (dict, list) and name[0] != "_"]
        self.containers += [v for name, v in values if name in ("_modules", "_parameters", "_buffers")]
        self.contents = [copy.copy(v) for v in self.containers]
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        changes = any(has_own_train(module) for module in model.modules())
        tensors = [t for t in state_of(model).values() if changes and not t.is_meta]
        # ``detach`` shares the memory, and keeps it if a module gives its tensor other memory.
        self.values = [(t, t.detach(), t.detach().clone()) for t in dict.fromkeys(tensors)]

    def restore(self) -> None:
        """Restore the attributes, tensors and flags."""
        for module, attributes in self.attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, before in zip(self.containers, self.contents, strict=True):
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        for tensor, memory, value in self.values:
            if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
                tensor.data = memory
            if not torch.equal(memory, value):
                tensor.data.copy_(value)  # not counted as a change, which the model's own ``train`` has undone
        for parameter, flag in self.flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def has_own_train(module: nn.Module) -> bool:
    """Return whether a module's ``train`` does more than torch's."""
    return type(module).train is not nn.Module.train or "train" in vars(module)


def saved_names(model: nn.Module) -> set[str]:
    """Return the names of the tensors that a model saves."""
    temporary = {
        f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        for own in module._non_persistent_buffers_set
    }
    return set(state_of(model)) - temporary


def require_names(model: nn.Module, before: set[str], after: set[str]) -> None:
    """Refuse a model whose parameters have other names in the other mode: its graph would not fit here."""
    if before == after:
        return
    first = min(before ^ after)
    owners = [(name, module) for name, module in model.named_modules() if has_own_train(module)]
    around = [(name, module) for name, module in owners if not name or first.startswith(f"{name}.")]
    name, module = around[-1] if around else ("", model)
    raise TraceError(
        f"{repr(name) if name else 'the model'} ({type(module).__name__}) has other parameters in train mode than in "
        f"eval mode (its train() adds or removes {', '.join(sorted(before ^ after)[:3])}): give a model whose train() "
        "changes no names"
    )


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
