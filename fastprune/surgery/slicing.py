"""Slice the tensors of a copied model, and the state of its optimizer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastprune.graph.model_state import state_of
from fastprune.graph.norms import FullCount, channels_of, count_fully
from fastprune.graph.plan import PlanError, PruningPlan
from fastprune.graph.structure import Slice
from fastprune.surgery.held_modules import class_of


class SurgeryError(ValueError):
    """The plan cannot be applied exactly to this model.

    Attributes:
        module: name of the module whose code failed; None if none did.
    """

    module: str | None = None


def slice_model(plan: PruningPlan, model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with compact tensors, not verified.

    Raises:
        PlanError: if the plan does not fit the model; names the tensor.
    """
    require_fit(plan, model)
    compact = copy_model(model)
    replaced: dict[int, Tensor] = {}
    for piece in plan.slices:
        owner_name, _, attribute = piece.tensor.rpartition(".")
        owner = compact.get_submodule(owner_name)
        shrink(owner, attribute, piece.dim, plan.kept_indices(piece), replaced)
    share_tied(compact, replaced)
    tensors = state_of(compact)
    depthwise = {id(tensors[s.tensor]) for s in plan.slices if s.role == "depthwise"}
    shrunk = {id(tensors[s.tensor]) for s in plan.slices}
    for name, module in compact.named_modules():
        own = {id(t) for t in (*module._parameters.values(), *module._buffers.values())}
        if own & shrunk and issubclass(class_of(module), nn.modules.conv._ConvNd):
            correct_convolution(module, name, depthwise=bool(own & depthwise))
        elif own & shrunk:
            correct_sizes(module)
    for norm in plan.narrowed_norms():
        count_fully(compact.get_submodule(norm.module), norm, len(plan.kept_indices(norm)))
    for path, (_, left) in plan.attributes.items():
        name, _, attribute = path.rpartition(".")
        owner = compact.get_submodule(name)
        old = getattr(owner, attribute)
        try:
            setattr(owner, attribute, left[0] if isinstance(old, int) else type(old)(left))
        except (AttributeError, TypeError, ValueError) as error:  # the class's own ``__setattr__`` or property
            raise SurgeryError(f"{path!r} of {type(model).__name__} cannot be changed: {error}") from error
    return compact


def copy_model(model: nn.Module) -> nn.Module:
    """Copy deeply. Tensors that modules keep from a run (the last weight of ``weight_norm``) become constants.

    Raises:
        SurgeryError: if a module holds an object that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in pytree.tree_leaves(dict(vars(module))):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:  # what Python and torch raise for such objects
        raise SurgeryError(f"{type(model).__name__} cannot be copied: {error}") from error


def require_fit(plan: PruningPlan, model: nn.Module) -> None:
    """Refuse a plan for another model."""
    state = state_of(model)
    for piece in plan.slices:
        tensor = state.get(piece.tensor)
        if tensor is None:
            raise PlanError(
                f"the plan is for another model: this {type(model).__name__} has no tensor {piece.tensor!r}"
            )
        if tensor.dim() <= piece.dim or tensor.shape[piece.dim] != len(piece.units):
            raise PlanError(
                f"the plan is for another model: {piece.tensor!r} has shape {tuple(tensor.shape)}, "
                f"the plan needs size {len(piece.units)} along dimension {piece.dim}"
            )

    require_norms(plan, model)
    for path, (full, _) in plan.attributes.items():
        name, _, attribute = path.rpartition(".")
        try:
            held = getattr(model.get_submodule(name), attribute)
        except AttributeError:
            held = None
        if not (type(held) is int and (held,) == full) and not (type(held) in (list, tuple) and tuple(held) == full):
            given = repr(held) if isinstance(held, (int, list, tuple)) else f"a {type(held).__name__}"
            raise PlanError(
                f"the plan is for another model: {path!r} is {given}, the plan needs "
                f"{full[0] if len(full) == 1 else list(full)}"
            )


def require_norms(plan: PruningPlan, model: nn.Module) -> None:
    """Refuse a plan whose norms are none of the model's."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for norm in plan.norms:
        module = modules.get(norm.module)
        width = None if module is None or module is model else channels_of(module)
        count = module.full_count if isinstance(module, FullCount) else width
        if (width, count) != (len(norm.units), norm.count):
            raise PlanError(
                f"the plan is for another model: it needs a norm over channels {norm.module!r} of "
                f"{describe_width(len(norm.units), norm.count)}; this {type(model).__name__} has "
                f"{'none' if width is None or count is None else f'one of {describe_width(width, count)}'}"
            )


def describe_width(channels: int, count: int) -> str:
    """Return the number of a norm's channels, and of those that it counts if these are more."""
    return str(channels) if channels == count else f"{channels}, which counts {count}"


def shrink(owner: nn.Module, attribute: str, dim: int, kept: Tensor, replaced: dict[int, Tensor]) -> None:
    """Keep the indices ``kept`` along ``dim`` of a tensor of ``owner``; ``replaced`` maps its id to the new one."""
    old: Tensor = getattr(owner, attribute)
    new = old.detach().index_select(dim, kept.to(old.device))
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    tensors: Any = owner._parameters if isinstance(old, nn.Parameter) else owner._buffers
    tensors[attribute] = new
    # Under its own id too, so that it lives on when the next dimension replaces it: a freed id would be given again.
    replaced[id(old)] = replaced[id(new)] = new


def share_tied(model: nn.Module, replaced: dict[int, Tensor]) -> None:
    """Give every other holder of a replaced tensor the new one."""
    for module in model.modules():
        holders: tuple[Any, ...] = (module._parameters, module._buffers)
        for tensors in holders:
            for attribute, tensor in list(tensors.items()):
                new = tensor
                while new is not None and replaced.get(id(new), new) is not new:
                    new = replaced[id(new)]
                tensors[attribute] = new


def correct_convolution(module: Any, name: str, *, depthwise: bool) -> None:
    """Set the stored sizes of a convolution to those of its weight.

    Raises:
        PlanError: if its groups do not fit what the plan says of the weight.
    """
    transposed = issubclass(class_of(module), nn.modules.conv._ConvTransposeNd)
    reads, makes = (0, 1) if transposed else (1, 0)
    refusal = f"the plan is for another model, or damaged: the weight of {name or type(module).__name__!r}"
    if depthwise and module.groups != module.in_channels:
        raise PlanError(
            f"{refusal} has the role 'depthwise', but its layer has groups={module.groups} and "
            f"in_channels={module.in_channels}"
        )
    if depthwise:
        multiplier = module.out_channels // module.in_channels
        module.groups = module.weight.shape[0] // (1 if transposed else multiplier)
    module.in_channels = module.weight.shape[reads] * (1 if transposed else module.groups)
    module.out_channels = module.weight.shape[makes] * (module.groups if transposed else 1)
    if module.in_channels % module.groups or module.out_channels % module.groups:
        raise PlanError(
            f"{refusal} keeps out_channels={module.out_channels}, which groups={module.groups} do not divide; a "
            "depthwise convolution needs the role 'depthwise'"
        )


def correct_sizes(module: Any) -> None:
    """Set the stored sizes of a layer to those of its tensors."""
    kind = class_of(module)
    if issubclass(kind, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif issubclass(kind, nn.GroupNorm):
        width = next(p.shape[0] for p in module._parameters.values() if p is not None)
        module.num_groups = max(1, module.num_groups * width // module.num_channels)  # groups leave as a whole
        module.num_channels = width
    elif isinstance(getattr(module, "normalized_shape", None), tuple):  # torch's LayerNorm, RMSNorm, and timm's own
        own = next(p for p in module._parameters.values() if p is not None)
        module.normalized_shape = tuple(own.shape)
    elif issubclass(kind, (nn.modules.batchnorm._NormBase, nn.PReLU)):
        tensors = (*module._parameters.values(), *module._buffers.values())
        width = next(t.shape[0] for t in tensors if t is not None and t.dim() == 1)
        setattr(module, "num_parameters" if issubclass(kind, nn.PReLU) else "num_features", width)


def slice_optimizer(optimizer: torch.optim.Optimizer, plan: PruningPlan, model: nn.Module, compact: nn.Module) -> None:
    """Let an optimizer of the full model continue with the compact one, in place: parameters and their state.

    State of a parameter's shape (momenta, second moments) is sliced like the parameter. Numbers (steps), options,
    parameter groups and references to the optimizer (in a learning-rate schedule) stay.

    Args:
        optimizer: SGD, Adam, AdamW or any other whose state is numbers and tensors of the parameters' shapes; it holds
            parameters of ``model``.
        plan: what stays.
        model: the full model.
        compact: its compact copy.

    Raises:
        ValueError: if the optimizer holds a parameter that is not the model's, or state of another shape; it is then
            unchanged.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    successors = dict(compact.named_parameters(remove_duplicate=False))
    pieces: dict[str, list[Slice]] = {}
    for piece in plan.slices:
        pieces.setdefault(piece.tensor, []).append(piece)
    aliases = {id(p): [n for n, q in successors.items() if q is p] for p in successors.values()}
    groups: list[list[nn.Parameter]] = []
    state: dict[Tensor, dict[str, Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        groups.append([])
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(f"optimizer: a parameter of its group {number} is not the model's")
            successor = successors[names[id(parameter)]]
            cuts = [piece for name in aliases[id(successor)] for piece in pieces.get(name, [])]
            groups[-1].append(successor)
            if parameter in optimizer.state:
                state[successor] = {
                    key: slice_state(value, parameter, cuts, plan, f"{names[id(parameter)]}, {key}")
                    for key, value in optimizer.state[parameter].items()
                }
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
    optimizer.state.clear()
    optimizer.state.update(state)


def slice_state(value: Any, parameter: Tensor, cuts: list[Slice], plan: PruningPlan, name: str) -> Any:
    """Slice one value of an optimizer's state for the compact parameter."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape != parameter.shape:
        raise ValueError(
            f"optimizer: its state of {name} has shape {tuple(value.shape)}; only state of the parameter's shape "
            f"{tuple(parameter.shape)} can be sliced"
        )
    for piece in cuts:
        value = value.index_select(piece.dim, plan.kept_indices(piece).to(value.device))
    return value
