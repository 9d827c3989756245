"""The proof that a compact network computes what the masked one computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune.graph.export.modes import mode_of
from fastprune.graph.model_state import state_of
from fastprune.graph.plan import PruningPlan
from fastprune.surgery.closed_inputs import ClosedInputs
from fastprune.surgery.slicing import SurgeryError, copy_model, require_fit

# Largest |compact - masked| / max |masked| that rounding explains beyond doubt. A float32 model that exceeds it, and
# any model of lower precision, is decided in float64.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6}


def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy of ``model``, of full size, in which nothing reads a closed channel; the compact model equals it.

    Every weight that reads a closed channel is zeroed, so the channel's values reach nothing. Where a layer computes
    its weight (weight standardisation), zeros would not stay zeros: there the closed channels of its input are zeroed.

    Under an inexact plan closed channels still count, with their values, in the statistics of the norms that they pass.
    Norms that were traced with ``replace_norms=True`` read closed channels as zeros, as layers do.

    Raises:
        PlanError: if the plan does not fit the model.
    """
    require_fit(plan, model)
    full = copy_model(model)
    tensors = state_of(full)
    closed_inputs: dict[str, Tensor] = {}
    with torch.no_grad():
        for piece in plan.slices:
            if piece.role != "in":
                continue
            closed = torch.ones(len(piece.units), dtype=torch.bool)
            closed[plan.kept_indices(piece)] = False
            if piece.computed:
                closed_inputs[piece.tensor] = closed
            else:
                weight = tensors[piece.tensor]
                weight.index_fill_(piece.dim, closed.nonzero().flatten().to(weight.device), 0.0)
    if closed_inputs:
        ClosedInputs(closed_inputs).attach(full)
    for norm in plan.narrowed_norms():
        closed = torch.ones(len(norm.units), dtype=torch.bool)
        closed[plan.kept_indices(norm)] = False
        hook = partial(close_channels, norm.dim, closed.nonzero().flatten())
        full.get_submodule(norm.module).register_forward_pre_hook(hook)
    return full


def close_channels(dim: int, closed: Tensor, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Zero the channels ``closed`` along ``dim`` in what a norm reads."""
    return (args[0].index_fill(dim, closed.to(args[0].device), 0.0), *args[1:])


def verify(plan: PruningPlan, model: nn.Module, compact: nn.Module, *, dtype: torch.dtype | None = None) -> float:
    """Prove on a random input that the compact model computes what the masked one computes, in eval mode.

    Under an inexact plan they differ, and the difference is measured.

    Args:
        plan: the plan that was applied.
        model: the full model.
        compact: its compact copy.
        dtype: precision of the comparison, float32 or float64; None = the model's own, then float64 where that does not
            decide.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        SurgeryError: if the compact model does not run, gives other shapes or values that are not finite, or differs by
            more than rounding (float64: 1e-9) under an exact plan.
    """
    if dtype is not None and dtype not in TOLERANCE:
        raise ValueError(f"dtype: got {dtype}; float32 or float64 is needed")
    require_values(model)
    reference = masked(model, plan)
    precisions = [dtype] if dtype is not None else precisions_for(model)
    if not plan.exact:
        return compare(plan, reference, compact, precisions[0])
    failure = f"the plan cannot be applied exactly to {type(model).__name__}: compact and masked outputs differ"
    return prove_equal(plan, reference, compact, precisions, failure)


def require_values(model: nn.Module) -> None:
    """Refuse to compare a model that has no values yet."""
    if any(t.is_meta for t in state_of(model).values()):
        raise SurgeryError(
            f"{type(model).__name__} is on the meta device and has no values to compare; load its weights first, "
            "or apply the plan with check=False"
        )


def precisions_for(model: nn.Module) -> list[torch.dtype]:
    """Return the precisions in which to compare a model, in order: float32 if all of it is float32, then float64."""
    all_float32 = {t.dtype for t in state_of(model).values() if t.is_floating_point()} == {torch.float32}
    return [torch.float32, torch.float64] if all_float32 else [torch.float64]


def prove_equal(
    plan: PruningPlan, reference: nn.Module, compact: nn.Module, precisions: list[torch.dtype], failure: str
) -> float:
    """Return the difference of two networks if rounding explains it in one of the precisions.

    Args:
        plan: gives the input.
        reference: what must be computed.
        compact: the network in question.
        precisions: tried in order; the last one decides.
        failure: begins the message of the error.

    Raises:
        SurgeryError: if rounding explains the difference in none of them.
    """
    for dtype in precisions:
        difference = compare(plan, reference, compact, dtype)
        if difference <= TOLERANCE[dtype]:
            return difference
    last = precisions[-1]
    if compare(plan, reference, reference, last) > TOLERANCE[last]:
        raise SurgeryError(
            f"{type(reference).__name__} computes something else each time, also in eval mode (it draws random "
            "numbers, or changes its state), so exactness cannot be checked; apply(plan, model, check=False) does not "
            "check it"
        )
    raise SurgeryError(f"{failure} by {difference:.1e} of the largest output in {str(last).removeprefix('torch.')}")


def compare(plan: PruningPlan, reference: nn.Module, compact: nn.Module, dtype: torch.dtype) -> float:
    """Return the largest difference of two models' outputs on one random input, relative to the largest output."""
    inputs = plan.example(compact).map(lambda x: x.to(converted_dtype(x.dtype, dtype)))
    precise: Any = Float64Mode() if dtype == torch.float64 else nullcontext()  # type: ignore[no-untyped-call]
    with torch.no_grad(), model_in_dtype(reference, dtype) as full, model_in_dtype(compact, dtype) as small, precise:
        with name_the_failing_module(full, f"the model itself does not run in {dtype}", "exactness cannot be checked"):
            expected = pytree.tree_leaves(inputs.run(full))
        with name_the_failing_module(
            small, "the compact model does not run", "its code expects a fixed number of channels", blame=True
        ):
            got = pytree.tree_leaves(inputs.run(small))
    if len(expected) != len(got):
        raise SurgeryError(f"the compact model returns {len(got)} values, the masked one {len(expected)}")
    pairs = [(a, b) for a, b in zip(expected, got, strict=True) if isinstance(a, Tensor)]
    return max((difference_of(a, b, exact=plan.exact) for a, b in pairs), default=0.0)


def difference_of(expected: Tensor, got: Tensor, *, exact: bool) -> float:
    """Return the largest difference of two outputs, relative to the largest value.

    Integers (class indices, say) are equal or not: their difference is infinite, or 1 under an inexact plan.

    Raises:
        SurgeryError: for outputs of two shapes, or of values that are not finite.
    """
    if expected.shape != got.shape:
        raise SurgeryError(
            f"the compact model returns shape {tuple(got.shape)}, the masked one {tuple(expected.shape)}"
        )
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, got) else float("inf") if exact else 1.0
    if not torch.isfinite(expected).all() or not torch.isfinite(got).all():
        raise SurgeryError("the model's output on a random input is not finite, so exactness cannot be checked")
    if not expected.numel():
        return 0.0
    scale, error = float(expected.abs().max()), float((expected - got).abs().max())
    return error / scale if scale > 0 else error


class Float64Mode(TorchDispatchMode):
    """Gives float64 to a model's own code that asks for a floating-point type (half precision, say) or for none."""

    supports_higher_order_operators = True

    def __enter__(self) -> Float64Mode:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.default)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs["dtype"] = converted_dtype(kwargs["dtype"], torch.float64)
        return func(*args, **kwargs)


@contextmanager
def model_in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Give ``model`` in eval mode and ``dtype``: itself if it has that precision already, else a copy."""
    if any(t.dtype != converted_dtype(t.dtype, dtype) for t in state_of(model).values()):
        model = copy_model(model)._apply(lambda t: t.to(converted_dtype(t.dtype, dtype)))
    with mode_of(model, training=False):
        yield model


def converted_dtype(own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a tensor of type ``own`` in computations of ``dtype``."""
    if own.is_complex:
        return dtype.to_complex()
    return dtype if own.is_floating_point else own


@contextmanager
def name_the_failing_module(model: nn.Module, what: str, why: str, *, blame: bool = False) -> Iterator[None]:
    """Turn an error inside ``model`` into one that says ``what`` failed, in which module, and ``why`` that matters.

    With ``blame`` the error has the module as its attribute.
    """
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
        failure = SurgeryError(
            f"{what}: {where or type(model).__name__!r} fails with {' '.join(str(error).split())[:300]}; {why}"
        )
        failure.module = where if blame else None
        raise failure from error
    finally:
        for hook in hooks:
            hook.remove()
