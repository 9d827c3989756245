"""Plan + model → compact model, and the proof that it computes what the masked model computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastprune.graph.rewrite import RewriteError
from fastprune.graph.tracing import Traced, TraceError, mode_of, state_of
from fastprune.plan import PlanError, PruningPlan
from fastprune.rewritten import rewritten

# Largest |compact - masked| / max |masked| that rounding explains beyond doubt. A float32 model that exceeds it, and
# any model of lower precision, is decided in float64.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6}


class SurgeryError(ValueError):
    """The plan cannot be applied exactly to this model."""


def apply(plan: PruningPlan, model: nn.Module, *, check: bool = True) -> nn.Module:
    """A compact copy of ``model`` that has only the channels that stay, verified against the masked model.

    Where the model's own code cannot run on fewer channels (it holds their number, or cuts where they were), the copy
    is a ``RewrittenNetwork``, if the plan's graph was traced with ``rewrite=True``.

    Args:
        plan: what stays.
        model: the model that was traced, or one of the same structure; it is not changed.
        check: whether ``verify`` runs; without it the copy is not proven exact, and whether the model's own code can
            run is not tried.

    Returns:
        The compact copy: same class (or a ``RewrittenNetwork``), same mode, same ``requires_grad`` flags, smaller
        tensors.

    Raises:
        PlanError: if the plan does not fit the model; names the tensor.
        SurgeryError: if the compact model fails to run or computes something else; names the module.
    """
    if check:
        return cut(plan, model).model
    compact = sliced(plan, model)
    return in_rewritten_graph(plan, model, compact) if plan.code == "rewritten" else compact


@dataclass(frozen=True)
class Cut:
    """A compact network that is proven exact.

    Args:
        model: the network.
        difference: the largest difference from the masked model's outputs, relative to the largest output.
        plan: the plan, which says whose code runs the network.
    """

    model: nn.Module
    difference: float
    plan: PruningPlan


def cut(plan: PruningPlan, model: nn.Module, traced: Traced | None = None) -> Cut:
    """The verified compact copy of ``model``; see ``apply``.

    Args:
        plan: what stays.
        model: the full model.
        traced: its graphs; None = traced here where they are needed.
    """
    compact = sliced(plan, model)
    if plan.code == "rewritten":
        compact = in_rewritten_graph(plan, model, compact, traced)
        return Cut(compact, verify(plan, model, compact), plan)
    try:
        return Cut(compact, verify(plan, model, compact), replace(plan, code="own"))
    except SurgeryError as error:
        if plan.code == "own":
            raise
        try:
            compact = in_rewritten_graph(plan, model, compact, traced)
            return Cut(compact, verify(plan, model, compact), replace(plan, code="rewritten"))
        except SurgeryError as second:
            raise SurgeryError(f"{error}. Nor can its rewritten graph: {second}") from second


def in_rewritten_graph(
    plan: PruningPlan, model: nn.Module, compact: nn.Module, traced: Traced | None = None
) -> nn.Module:
    """The compact network as a rewritten graph, on the tensors of ``compact``."""
    try:
        return rewritten(plan, model, compact, traced)
    except (RewriteError, TraceError) as error:
        raise SurgeryError(f"the plan cannot be applied to {type(model).__name__}: {error}") from error


def sliced(plan: PruningPlan, model: nn.Module) -> nn.Module:
    """A copy of ``model`` with compact tensors, not verified."""
    fits(plan, model)
    compact = copied(model)
    replaced: dict[int, Tensor] = {}
    for piece in plan.slices:
        owner_name, _, attribute = piece.tensor.rpartition(".")
        owner = compact.get_submodule(owner_name)
        shrink(owner, attribute, piece.dim, plan.kept_indices(piece), replaced)
    share_tied(compact, replaced)
    tensors = state_of(compact)
    depthwise = {id(tensors[s.tensor]) for s in plan.slices if s.role == "depthwise"}
    shrunk = {id(tensors[s.tensor]) for s in plan.slices}
    for module in compact.modules():
        own = {id(t) for t in (*module._parameters.values(), *module._buffers.values())}
        if own & shrunk:
            mend(module, depthwise=bool(own & depthwise))
    return compact


def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of ``model`` of full size in which nothing reads a closed channel: what the compact model must equal.

    Every weight that reads a closed channel is zeroed, so whatever the channel holds cannot reach anything.

    Raises:
        PlanError: if the plan does not fit the model.
    """
    fits(plan, model)
    full = copied(model)
    tensors = state_of(full)
    with torch.no_grad():
        for piece in plan.slices:
            if piece.role == "in":
                closed = torch.ones(len(piece.units), dtype=torch.bool)
                closed[plan.kept_indices(piece)] = False
                weight = tensors[piece.tensor]
                weight.index_fill_(piece.dim, closed.nonzero().flatten().to(weight.device), 0.0)
    return full


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; refuses modules that hold what an autograd graph made, and names them."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise SurgeryError(
                    f"the model cannot be copied: {attribute!r} of {name or type(model).__name__!r} is computed from "
                    "other tensors (torch.nn.utils.weight_norm does that; torch.nn.utils.parametrizations does not)"
                )
    return copy.deepcopy(model)


def fits(plan: PruningPlan, model: nn.Module) -> None:
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


def shrink(owner: nn.Module, attribute: str, dim: int, kept: Tensor, replaced: dict[int, Tensor]) -> None:
    """Keep the indices ``kept`` along ``dim`` of a parameter or buffer of ``owner``."""
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


def mend(module: nn.Module, *, depthwise: bool) -> None:
    """Bring a module's stored sizes into line with its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        reads, makes = (0, 1) if transposed else (1, 0)
        if depthwise:
            multiplier = module.out_channels // module.in_channels
            module.groups = module.weight.shape[0] // (1 if transposed else multiplier)
        module.in_channels = module.weight.shape[reads] * (1 if transposed else module.groups)
        module.out_channels = module.weight.shape[makes] * (module.groups if transposed else 1)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        width = next(p.shape[0] for p in module._parameters.values() if p is not None)
        module.num_groups = module.num_groups * width // module.num_channels
        module.num_channels = width
    elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.PReLU)):
        tensors = (*module._parameters.values(), *module._buffers.values())
        width = next(t.shape[0] for t in tensors if t is not None and t.dim() == 1)
        setattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", width)


def verify(plan: PruningPlan, model: nn.Module, compact: nn.Module, *, dtype: torch.dtype | None = None) -> float:
    """Prove on a random input that the compact model computes what the masked one computes, in eval mode.

    Args:
        plan: the plan that was applied.
        model: the full model.
        compact: its compact copy.
        dtype: precision of the comparison, float32 or float64; None = the model's own, and float64 where that does not
            decide.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        SurgeryError: if the compact model does not run, or differs by more than rounding (float64: 1e-9).
    """
    if any(t.is_meta for t in state_of(model).values()):
        raise SurgeryError(
            f"{type(model).__name__} is on the meta device and has no values to compare; load its weights first, "
            "or apply the plan with check=False"
        )
    reference = masked(model, plan)
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for chosen in [dtype] if dtype is not None else sorted({own, torch.float64}, key=lambda d: d.itemsize):
        if chosen in TOLERANCE:
            difference = compare(plan, reference, compact, chosen)
            if difference <= TOLERANCE[chosen]:
                return difference
    if dtype is not None and dtype not in TOLERANCE:
        raise ValueError(f"dtype {dtype}: float32 or float64 is needed")
    raise SurgeryError(
        f"the plan cannot be applied exactly to {type(model).__name__}: compact and masked outputs differ by "
        f"{difference:.1e} of the largest output in {str(chosen).removeprefix('torch.')}"
    )


def compare(plan: PruningPlan, reference: nn.Module, compact: nn.Module, dtype: torch.dtype) -> float:
    """The largest difference of two models' outputs on one random input, relative to the largest output."""
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in compact.parameters()), torch.device("cpu"))
    inputs = [spec.sample(generator).to(device) for spec in plan.inputs]
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    with torch.no_grad(), in_dtype(reference, dtype) as full, in_dtype(compact, dtype) as small:
        with name_the_failing_module(full, f"the model itself does not run in {dtype}", "exactness cannot be checked"):
            expected = pytree.tree_leaves(full(*inputs))
        with name_the_failing_module(
            small, "the compact model does not run", "its code expects a fixed number of channels"
        ):
            got = pytree.tree_leaves(small(*inputs))
    if len(expected) != len(got):
        raise SurgeryError(f"the compact model returns {len(got)} values, the masked one {len(expected)}")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if isinstance(a, Tensor) and not a.is_floating_point():
            worst = worst if torch.equal(a, b) else float("inf")  # class indices, say: equal or not
        elif isinstance(a, Tensor):
            if a.shape != b.shape:
                raise SurgeryError(f"the compact model returns shape {tuple(b.shape)}, the masked one {tuple(a.shape)}")
            scale = float(a.abs().max()) if a.numel() else 0.0
            error = float((a - b).abs().max()) if a.numel() else 0.0
            worst = max(worst, error / scale if scale > 0 else error)
            if not torch.isfinite(a).all() or not torch.isfinite(b).all():
                raise SurgeryError("the model's output on a random input is not finite, so exactness cannot be checked")
    return worst


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """``model`` in eval mode and ``dtype``: itself where it has that precision already, a copy elsewhere."""
    floating = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    converted = model if all(t.dtype == dtype for t in floating) else copy.deepcopy(model).to(dtype)
    with mode_of(converted, training=False):
        yield converted


@contextmanager
def name_the_failing_module(model: nn.Module, what: str, why: str) -> Iterator[None]:
    """Turn an error inside ``model`` into one that says ``what`` failed, in which module, and ``why`` that matters."""
    names = {module: name for name, module in model.named_modules()}
    entered: list[str] = []
    hooks: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.append(names[module])

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        entered.pop()

    for module in names:
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    except Exception as error:  # the model's own code may raise anything
        where = entered[-1] if entered else ""
        raise SurgeryError(
            f"{what}: {where or type(model).__name__!r} fails with {' '.join(str(error).split())[:300]}; {why}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
