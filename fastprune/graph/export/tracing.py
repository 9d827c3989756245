"""From a module to its operator graphs: one of its eval mode, and one of its train mode if that reaches more."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fastprune.graph.export.exporter import export, silence_exporter
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.export.modes import mode_of
from fastprune.graph.export.nodes import concrete
from fastprune.graph.export.open_sizes import Guards
from fastprune.graph.export.refusals import TraceError, refuse
from fastprune.graph.model_state import has_no_values, parameter_names, state_of

Results = tuple[pytree.TreeSpec, list[tuple[int, ...] | None]]  # how results are nested, and the shapes of tensors


@dataclass(frozen=True)
class Traced:
    """The operator graphs of one model.

    Args:
        evaluation: the graph in eval mode.
        training: the graph in train mode, None unless it reaches parameters that the eval-mode graph does not.
        inputs: the example that was traced, batch of at least 2.
        any_batch: False if the graph holds for the example's batch size only.
        guards: {training: the input sizes for which its graph holds}; empty = the example's sizes only.
    """

    evaluation: GraphModule
    training: GraphModule | None
    inputs: Inputs
    any_batch: bool
    guards: Mapping[bool, Guards] = field(default_factory=dict)
    _derived: dict[str, Traced] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derive(self, name: str, make: Callable[[], Traced]) -> Traced:
        """Return further graphs of the same code, which ``make`` exports the first time."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the operator graphs, which hold functions of the exporter."""
        graphs = ("evaluation", "training", "_derived")
        return {name: value for name, value in vars(self).items() if name not in graphs}

    def __getattr__(self, name: str) -> Any:
        """Refuse the operator graphs of an object that was pickled."""
        if name in ("evaluation", "training"):
            raise TraceError(
                "this channel graph was pickled, and its operator graphs were left out; trace the model again: "
                "fastprune.trace(model, example)"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        """Copy the operator graphs too."""
        return Traced(**{f.name: copy.deepcopy(getattr(self, f.name), memo) for f in fields(self) if f.init})


def trace_graphs(model: nn.Module, example: Example | Inputs) -> Traced:
    """Trace ``model`` in eval mode and, if train mode reaches or returns something else, in train mode too.

    Auxiliary heads exist only in train mode; without them a compact model would break in ``train()``.
    """
    refuse(model)
    inputs = example if isinstance(example, Inputs) else Inputs.from_example(example, model)
    if has_no_values(model):
        inputs = inputs.map(lambda x: x.to("meta"))
    evaluation, any_batch = export(model, inputs, training=False)
    if not any(shape is not None for shape in results_of(evaluation)[1]):
        raise TraceError(f"{type(model).__name__} returns no tensor, so that nothing depends on its channels")
    training = None
    unread = parameter_names(model) - parameters_read(evaluation)
    if unread or results_in_training(model, inputs) not in (None, results_of(evaluation)):
        try:
            training, _ = export(model, inputs, training=True)
        except TraceError as error:
            warn_untraced(unread, error)
    return Traced(evaluation, training, inputs, any_batch)


def warn_untraced(unread: set[str], error: TraceError) -> None:
    """Warn that train mode cannot be traced; ``unread`` are the parameters that eval mode does not reach."""
    owners = sorted({name.rpartition(".")[0] for name in unread})
    what = "other results in train mode than in eval mode, and train mode cannot be traced"
    if owners:
        what = f"not reached in eval mode, and train mode cannot be traced: {', '.join(owners[:5])}. They stay"
    warnings.warn(f"{what}, and a compact model may not run in train mode. {error}", stacklevel=4)


def results_of(graph: GraphModule) -> Results:
    """Return the structure and the shapes of a graph's results."""
    codegen: Any = graph.graph._codegen
    output = next(node for node in graph.graph.nodes if node.op == "output")
    values = [getattr(x, "meta", {}).get("val") for x in pytree.tree_leaves(output.args)]
    shapes = [tuple(map(concrete, x.shape)) if isinstance(x, Tensor) else None for x in values]
    return codegen.pytree_info.out_spec, shapes


def results_in_training(model: nn.Module, inputs: Inputs) -> Results | None:
    """Return the structure and the shapes of a model's results in train mode, found without computing.

    None if its code needs values.
    """
    with mode_of(model, training=True), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        state: dict[str, Any] = {name: fake.from_tensor(tensor) for name, tensor in state_of(model).items()}
        try:
            given = inputs.map(fake.from_tensor)
            with silence_exporter():
                result = torch.func.functional_call(model, state, given.args, dict(given.kwargs), tie_weights=False)
        except Exception:  # the model's own code may raise anything
            return None
    leaves, spec = pytree.tree_flatten(result)
    return spec, [tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves]


def parameters_read(graph: GraphModule) -> set[str]:
    """Return the names of the parameters that the graph reads."""
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr" and node.users}
    return {name for name, _ in graph.named_parameters(remove_duplicate=False) if name in names}
