"""The compiled kernels, and how an operator becomes ``torch.ops.fastprune._name``.

``Library.define`` and ``impl`` cost 2 us a call, ``torch.library.custom_op`` with autograd 8 to 12.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastprune import _C

__all__ = ["_C", "refuse_transforms", "register"]

LIBRARY = torch.library.Library("fastprune", "DEF")
"""Kept alive here: its operators vanish with it."""


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator of the library ``fastprune``.

    Args:
        schema: As for ``torch.library.Library.define``; the name starts with an underscore, since users call the
            function of :mod:`fastprune.ops` that wraps it.
        kernel: Runs on the CPU and on CUDA. ``fastprune._C`` checks the arguments and picks the device.
        fake: Makes the results for tensors without data, with their shapes and dtypes.
    """
    LIBRARY.define(schema)
    name = schema[: schema.index("(")]
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"fastprune::{name}", fake, lib=LIBRARY)


def refuse_transforms(name: str) -> None:
    """Refuse vmap, torch.func.grad and their like, and say what to do; torch would tell the user to change our code.

    The form of autograd.Function that they need costs 12 us more a call.

    Raises:
        RuntimeError: The call is inside of such a transform.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name}: got a call under a transform of torch.func (vmap, grad, jvp, ...), needs plain autograd: "
            "torch.autograd.grad or backward(), and one call for each sample"
        )
