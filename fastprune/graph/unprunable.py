"""Layers with output channels that always stay, and the reasons."""

from __future__ import annotations

import numpy as np
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

from fastprune.graph.labels.labels import IntArray
from fastprune.graph.labels.propagate import Propagation

REMOVED_BY = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}  # hooks of torch.nn.utils


def list_unprunable(
    model: nn.Module, state: Propagation, components: IntArray, reasons: dict[int, str]
) -> tuple[tuple[str, str], ...]:
    """Return every convolution and linear layer with output channels that always stay, and why."""
    listed: dict[str, str] = {}
    for call in state.calls:
        pinned = [c for c in np.unique(components[call.out_labels.numpy()]).tolist() if c == 0 or c in reasons]
        if pinned and call.layer not in listed:
            listed[call.layer] = reasons.get(pinned[0], "reads the input of the network channel by channel")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen = {id(parameters[d.tensor]) for d in state.dims.values() if d.tensor in parameters}
    for name, module in model.named_modules():
        if (
            isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
            and id(module._parameters.get("weight")) not in seen
        ):
            listed.setdefault(name, state.locked.get(f"{name}.weight", explain_unread(name, module)))
    return tuple(listed.items())


def explain_unread(name: str, module: nn.Module) -> str:
    """Say why no operator reads a layer's weight directly, and what makes it a plain parameter."""
    if is_parametrized(module, "weight"):
        kinds = ", ".join(type(p).__name__.lstrip("_") for p in module.parametrizations["weight"])  # type: ignore[index]
        remove = f"torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule({name!r}), 'weight')"
        return f"its weight is parametrised ({kinds}); {remove} makes it a plain one"
    for hook in module._forward_pre_hooks.values():
        known = REMOVED_BY.get(type(hook).__name__) or ("prune.remove" if isinstance(hook, BasePruningMethod) else None)
        if known is not None and "weight" not in module._parameters:
            arguments = f"model.get_submodule({name!r}), 'weight'"
            return f"its weight is computed by a hook; torch.nn.utils.{known}({arguments}) makes it a plain one"
    if "weight" not in module._parameters:
        return "its weight is no parameter"
    return "never reached in the traced graph, or its weight is not read directly"
