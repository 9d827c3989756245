"""Checks of what users pass to functions: a value of a wrong type gives one clear line at once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune.options import LARGEST_SEED
from fastprune.planning.resources import RESOURCES
from fastprune.training.objective import Forward, Loss, Objective

KINDS: dict[str, tuple[tuple[type[Any], ...], str]] = {
    "model": ((nn.Module,), "a torch.nn.Module"),
    "out": ((str, Path, type(None)), "the path of a directory"),
    "device": ((str, torch.device, type(None)), "'cpu', 'cuda', 'cuda:N' or 'auto'"),
    "precision": ((str,), "'float32' or 'bf16'"),
    "seed": ((int,), "a whole number"),
    "resume": ((bool,), "True or False"),
    "channels_last": ((bool,), "True or False"),
    "rewrite": ((bool,), "True or False"),
    "exact": ((bool,), "True or False"),
    "replace_norms": ((bool,), "True or False"),
    "heads": ((bool,), "True or False"),
    "run_config": ((Mapping, type(None)), "a dict of settings"),
}
"""The types that arguments may have, and how to say them."""


def check_arguments(**arguments: object) -> None:
    """Refuse arguments of wrong types.

    Raises:
        TypeError: for the first of them; says what is needed.
        ValueError: for a seed out of range.
    """
    for name, value in arguments.items():
        kinds, need = KINDS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            hint = "; give the network itself, not its class" if name == "model" and isinstance(value, type) else ""
            raise TypeError(f"{name}: got {type(value).__name__}; {need} is needed{hint}")
    seed = arguments.get("seed", 0)
    if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed {seed}: a number from 0 to {LARGEST_SEED} is needed")


def check_kind(name: str, value: object, kind: type[Any]) -> None:
    """Refuse an argument that is neither None nor a ``kind``.

    Raises:
        TypeError: says what is needed.
    """
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: got {type(value).__name__}; {kind.__name__} is needed")


def make_objective(loss: Loss | None, forward: Forward | None) -> Objective:
    """Return the objective of the arguments ``loss`` and ``forward``.

    Raises:
        TypeError: for one that cannot be called.
    """
    for name, value, form in (("loss", loss, "loss(output, target)"), ("forward", forward, "forward(model, batch)")):
        if isinstance(value, type):
            raise TypeError(f"{name}: got the class {value.__name__}; give an instance of it, {value.__name__}()")
        if value is not None and not callable(value):
            raise TypeError(f"{name}: got {type(value).__name__}; a function {form} is needed")
        if value is not None:
            require_two_arguments(name, value, form)
    return Objective(loss, forward)


def require_two_arguments(name: str, function: Any, form: str) -> None:
    """Refuse a function that cannot be called with two arguments.

    Raises:
        TypeError: says what it takes and how it is called.
    """
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # of functions in C, which have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        got = getattr(function, "__name__", type(function).__name__)
        raise TypeError(f"{name}: got {got}{signature}; it is called as {form}: {error}") from error


def refuse_resources(options: Mapping[str, Any]) -> None:
    """Refuse a cost as an option of its own, as in ``macs=0.5``.

    Raises:
        ValueError: says how to write it.
    """
    for name, value in options.items():
        if name in RESOURCES or name == "macs":
            raise ValueError(f"{name} {value!r}: a cost is limited by budget=; write budget='{name}={value}'")
