"""A graph that holds for other sizes of its inputs, and the conditions that these sizes must meet."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastprune.graph.export.exporter import silence_exporter
from fastprune.graph.export.inputs import Inputs
from fastprune.graph.export.modes import mode_of
from fastprune.graph.export.refusals import TraceError, explain
from fastprune.graph.export.regions import inline_regions


class Guards:
    """The input sizes for which a graph holds; after pickling, the traced sizes alone.

    Args:
        check: the exporter's conditions, a function that takes tensors and raises; None = the traced sizes alone.
    """

    def __init__(self, check: Callable[..., Any] | None = None) -> None:
        self.check = check
        self.met: set[tuple[tuple[int, ...], ...]] = set()

    def __deepcopy__(self, memo: Any) -> Guards:
        return self

    def __reduce__(self) -> Any:
        return Guards, ()

    def record(self, shapes: Sequence[tuple[int | torch.SymInt, ...]]) -> bool:
        """Let an exporter or compiler that leaves sizes open see the conditions on them; return whether it has."""
        if self.check is None or not torch.compiler.is_compiling():
            return False
        self.check(*(torch.empty(shape, device="meta") for shape in shapes))
        return True

    def unmet(self, shapes: Sequence[tuple[int, ...]]) -> str | None:
        """Return the condition that inputs of these shapes break, None if they meet all."""
        if self.check is None:
            return "its graph holds for these sizes"
        if tuple(shapes) not in self.met:
            try:
                self.check(*(torch.empty(shape, device="meta") for shape in shapes))
            except AssertionError as error:
                return str(error).removeprefix("Guard failed: ") + " is needed"
            self.met.add(tuple(shapes))
        return None


class ShortSizes(TorchFunctionMode):
    """Stop an export whose sizes become long formulas of the input sizes: simplifying them takes minutes, then hours.

    Strides and windows make formulas of a few operations, such as ``(s - 1) // 8 + 1``. Code that computes its
    padding from the size ("same" padding), or divides images into equal patches, nests another formula with each layer.
    """

    most = 16  # operations

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.check(func, [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.SymInt)])
        result = func(*args, **(kwargs or {}))
        self.check(func, [size for x in pytree.tree_leaves(result) if isinstance(x, Tensor) for size in x.shape])
        return result

    def check(self, func: Callable[..., Any], sizes: list[Any]) -> None:
        """Refuse formulas of more than ``most`` operations."""
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.count_ops() > self.most:
                name = getattr(func, "__name__", str(func))
                raise TraceError(f"{name}: the sizes are no short formulas of those of the inputs")


def export_for_sizes(model: nn.Module, inputs: Inputs, *, training: bool) -> tuple[GraphModule, Guards]:
    """Return the graph of ``model`` with its input sizes left open where its code allows it, and its guards.

    Raises:
        TraceError: if its code allows no other sizes.
    """
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    shapes = pytree.tree_map_only(Tensor, lambda x: dict.fromkeys(range(x.dim()), Dim.AUTO), dict(bound))
    try:
        with mode_of(model, training=training), silence_exporter(), ShortSizes():
            program = torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)
            module: Any = program.module(check_guards=True)
    except Exception as error:  # the exporter raises what the model's own code raises
        raise TraceError(explain(model, error)) from error
    check = module._guards_fn.forward
    inline_regions(module)
    return module, Guards(check)
