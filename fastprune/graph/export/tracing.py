"""From a module to its operator graphs: ``torch.export`` in eval mode, and in train mode where that reaches more."""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.export.refusals import TraceError, explained, refuse
from fastprune.graph.export.regions import write_out
from fastprune.graph.model_state import has_no_values, mode_of, parameter_names, state_of

STACK_TRACES = "do_not_emit_stack_traces"  # a setting of torch.fx since 2.15; without it they only take time


class Guards:
    """For which other sizes of its inputs a graph holds; one that was pickled holds for the traced sizes alone.

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

    def unmet(self, shapes: Sequence[tuple[int, ...]]) -> str | None:
        """What inputs of these shapes do not meet, None if they meet all."""
        if self.check is None:
            return "its graph holds for these sizes"
        if tuple(shapes) not in self.met:
            try:
                self.check(*(torch.empty(shape, device="meta") for shape in shapes))
            except AssertionError as error:
                return str(error).removeprefix("Guard failed: ") + " is needed"
            self.met.add(tuple(shapes))
        return None


@dataclass(frozen=True)
class Traced:
    """The operator graphs of one model.

    Args:
        evaluation: the graph in eval mode.
        training: the graph in train mode, None unless it reaches parameters that the eval-mode graph does not.
        inputs: the example that was traced, batch of at least 2.
        any_batch: False where the graph holds for the example's batch size only.
        guards: {training: for which other sizes its graph holds}; without them for the example's.
    """

    evaluation: GraphModule
    training: GraphModule | None
    inputs: Inputs
    any_batch: bool
    guards: Mapping[bool, Guards] = field(default_factory=dict)


@contextmanager
def uncollected() -> Iterator[None]:
    """Spare an export garbage collection among millions of short-lived objects that refer to each other, and the source
    lines of every node: a tenth of its time for ResNet-50, more for larger networks.
    """
    collects, config = gc.isenabled(), torch.fx.config
    emitted = getattr(config, STACK_TRACES, None)
    gc.disable()
    if emitted is not None:
        setattr(config, STACK_TRACES, True)
    try:
        yield
    finally:
        if collects:
            gc.enable()
        if emitted is not None:
            setattr(config, STACK_TRACES, emitted)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep back what the exporter prints before it raises (half a graph), and run compiled modules as they are.

    Nor is it of interest that modules keep what they see: ``mode_of`` undoes it.
    """
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    was_disabled, log.disabled = log.disabled, True
    try:
        with (
            uncollected(),
            torch.compiler.set_stance("force_eager"),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "The tensor attribute")
            yield
    finally:
        log.disabled = was_disabled


def export(model: nn.Module, inputs: Inputs, *, training: bool) -> tuple[GraphModule, bool]:
    """The graph of ``model`` on its own parameters, and whether it holds for any batch size."""
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    any_batch = pytree.tree_map_only(Tensor, lambda _: {0: Dim.AUTO}, dict(bound))
    errors: list[Exception] = []
    with mode_of(model, training=training):
        for shapes in (any_batch, None):
            try:
                with quietly():
                    program = torch.export.export(
                        model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
                    )
            except Exception as error:  # the exporter raises what the model's own code raises
                errors.append(error)
                continue
            module: Any = program.module(check_guards=False)
            write_out(module)
            return module, all(map(open_batch, module.graph.find_nodes(op="placeholder")))
    raise TraceError(explained(model, errors[-1])) from errors[-1]


def open_batch(node: Node) -> bool:
    """Whether a graph leaves the batch size of an input open, which the exporter does where the model allows it."""
    size = node.meta["val"].shape[0]
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


class ShortSizes(TorchFunctionMode):
    """Stop an export whose sizes become long formulas of the inputs' sizes: simplifying them takes minutes, then hours.

    Strides and windows make formulas of a few operations, such as ``(s - 1) // 8 + 1``. Code that pads by what a layer
    lacks ("same" padding), or divides images into equal patches, nests another formula into them with each layer.
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
    """The graph of ``model`` with the sizes of its inputs left open where its code allows it, and where it does not.

    Raises:
        TraceError: where its code allows none.
    """
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    shapes = pytree.tree_map_only(Tensor, lambda x: dict.fromkeys(range(x.dim()), Dim.AUTO), dict(bound))
    try:
        with mode_of(model, training=training), quietly(), ShortSizes():
            program = torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)
            module: Any = program.module(check_guards=True)
    except Exception as error:  # the exporter raises what the model's own code raises
        raise TraceError(explained(model, error)) from error
    check = module._guards_fn.forward
    write_out(module)
    return module, Guards(check)


def trace_graphs(model: nn.Module, example: Example | Inputs) -> Traced:
    """Trace ``model`` in eval mode and, where train mode reaches or returns something else, in train mode too.

    Auxiliary heads exist only in train mode; without them a compact model would break in ``train()``.
    """
    refuse(model)
    inputs = example if isinstance(example, Inputs) else Inputs.of(example, model)
    if has_no_values(model):
        inputs = inputs.map(lambda x: x.to("meta"))
    evaluation, any_batch = export(model, inputs, training=False)
    if not any(shape is not None for shape in results_of(evaluation)[1]):
        raise TraceError(f"{type(model).__name__} returns no tensor, so that nothing depends on its channels")
    training = None
    all_read = parameters_read(evaluation) >= parameter_names(model)
    if not all_read or results_in_training(model, inputs) not in (None, results_of(evaluation)):
        try:
            training, _ = export(model, inputs, training=True)
        except TraceError as error:
            unread = parameter_names(model) - parameters_read(evaluation)
            owners = sorted({name.rpartition(".")[0] for name in unread})
            what = "other results in train mode than in eval mode, and train mode cannot be traced"
            if owners:
                what = f"not reached in eval mode, and train mode cannot be traced: {', '.join(owners[:5])}. They stay"
            warnings.warn(f"{what}, and a compact model may not run in train mode. {error}", stacklevel=3)
    return Traced(evaluation, training, inputs, any_batch)


Results = tuple[pytree.TreeSpec, list[tuple[int, ...] | None]]  # how they are nested, and the shapes of tensors


def results_of(graph: GraphModule) -> Results:
    """What a graph returns."""
    codegen: Any = graph.graph._codegen
    output = next(node for node in graph.graph.nodes if node.op == "output")
    values = [getattr(x, "meta", {}).get("val") for x in pytree.tree_leaves(output.args)]
    shapes = [tuple(map(concrete, x.shape)) if isinstance(x, Tensor) else None for x in values]
    return codegen.pytree_info.out_spec, shapes


def results_in_training(model: nn.Module, inputs: Inputs) -> Results | None:
    """What a model returns in train mode, found without computing; None where its code cannot do without values."""
    with mode_of(model, training=True), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        state: dict[str, Any] = {name: fake.from_tensor(tensor) for name, tensor in state_of(model).items()}
        try:
            given = inputs.map(fake.from_tensor)
            with quietly():
                result = torch.func.functional_call(model, state, given.args, dict(given.kwargs), tie_weights=False)
        except Exception:  # the model's own code may raise anything
            return None
    leaves, spec = pytree.tree_flatten(result)
    return spec, [tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves]


def parameters_read(graph: GraphModule) -> set[str]:
    """The names of the parameters that the graph reads."""
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr" and node.users}
    return {name for name, _ in graph.named_parameters(remove_duplicate=False) if name in names}


def concrete(size: int | torch.SymInt) -> int:
    """The value that a size had on the example."""
    if isinstance(size, torch.SymInt):
        if size.node.hint is None:
            raise TraceError(
                "the model makes a tensor whose size depends on the values of its input (nonzero, a boolean index); "
                "trace the part in front of it, or make it a custom operator (docs/custom_operators.md)"
            )
        return int(str(size.node.hint))
    return size
