"""From a module to its operator graphs: ``torch.export`` in eval mode, and in train mode where that reaches more."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fastprune.graph.inputs import Example, Inputs


class TraceError(ValueError):
    """The model cannot be exported, so nothing is known about its channels."""


@dataclass(frozen=True)
class Traced:
    """The operator graphs of one model.

    Args:
        evaluation: the graph in eval mode.
        training: the graph in train mode, None unless it reaches parameters that the eval-mode graph does not.
        inputs: the example that was traced, batch of at least 2.
        any_batch: False where the graph holds for the example's batch size only.
    """

    evaluation: GraphModule
    training: GraphModule | None
    inputs: Inputs
    any_batch: bool


@contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put ``model`` into train or eval mode, and every submodule back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def export(model: nn.Module, inputs: Inputs, *, training: bool) -> tuple[GraphModule, bool]:
    """The graph of ``model`` on its own parameters, and whether it holds for any batch size."""
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    any_batch = pytree.tree_map_only(Tensor, lambda _: {0: Dim.AUTO}, dict(bound))
    errors: list[Exception] = []
    with mode_of(model, training=training):
        for shapes in (any_batch, None):
            try:
                program = torch.export.export(
                    model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
                )
            except Exception as error:  # the exporter raises what the model's own code raises
                errors.append(error)
                continue
            module: Any = program.module(check_guards=False)
            return module, shapes is not None
    reason = " ".join(str(errors[-1]).split())[:400]
    raise TraceError(f"{type(model).__name__} cannot be traced by torch.export: {type(errors[-1]).__name__}: {reason}")


def trace_graphs(model: nn.Module, example: Example | Inputs) -> Traced:
    """Trace ``model`` in eval mode and, where train mode reaches or returns something else, in train mode too.

    Auxiliary heads exist only in train mode; without them a compact model would break in ``train()``.
    """
    inputs = example if isinstance(example, Inputs) else Inputs.of(example, model)
    evaluation, any_batch = export(model, inputs, training=False)
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
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, mode_of(model, training=True):
        state: dict[str, Any] = {name: fake.from_tensor(tensor) for name, tensor in state_of(model).items()}
        try:
            given = inputs.map(fake.from_tensor)
            result = torch.func.functional_call(model, state, given.args, dict(given.kwargs), tie_weights=False)
        except Exception:  # the model's own code may raise anything
            return None
    leaves, spec = pytree.tree_flatten(result)
    return spec, [tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def attribute_of(module: nn.Module, name: str) -> Any:
    """What a module holds under a dotted name."""
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def parameter_names(model: nn.Module) -> set[str]:
    """The names of the distinct parameters."""
    return {name for name, _ in model.named_parameters()}


def parameters_read(graph: GraphModule) -> set[str]:
    """The names of the parameters that the graph reads."""
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr" and node.users}
    return {name for name, _ in graph.named_parameters(remove_duplicate=False) if name in names}


def concrete(size: int | torch.SymInt) -> int:
    """The value that a size had on the example."""
    if isinstance(size, torch.SymInt):
        if size.node.hint is None:
            raise TraceError("the model makes a tensor whose size depends on the values of its input")
        return int(str(size.node.hint))
    return size
