"""A compact network that runs its rewritten graph, because the model's own code cannot run it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastprune.graph.export.exporter import export
from fastprune.graph.export.open_sizes import Guards, export_for_sizes
from fastprune.graph.export.refusals import TraceError
from fastprune.graph.export.regions import restore_modes
from fastprune.graph.export.tracing import Traced, trace_graphs
from fastprune.graph.labels.interpret import run_on_labels
from fastprune.graph.labels.propagate import Propagation
from fastprune.graph.model_state import attribute_of, state_of
from fastprune.graph.plan import PlanError, PruningPlan
from fastprune.graph.rewrite import RewriteError, RewrittenGraph, rewrite
from fastprune.surgery.held_modules import Delegating, hold, make_empty


@dataclass
class Program:
    """What a rewritten network runs.

    Args:
        graphs: {mode, True = training: its graph, or the reason why there is none}.
        fixed: tensors that are no part of the model: constants of its code, and indices by which graphs select
            channels. They are no buffers, so averages of weights and buffers do not change them.
        takes: {mode: names of the tensors that the graph takes after its inputs}, of the network or fixed.
        signature: that of the model's ``forward``.
        arguments: names of the arguments that were given when the network was traced.
        shapes: shapes of the inputs that it was traced with.
        any_batch: whether it takes batches of any size.
        guards: conditions on other input sizes, for the graph of each mode.
    """

    graphs: dict[bool, RewrittenGraph | str]
    fixed: dict[str, Tensor]
    takes: dict[bool, list[str]]
    signature: inspect.Signature
    arguments: list[str]
    shapes: list[tuple[int, ...]]
    any_batch: bool
    guards: dict[bool, Guards]


class RewrittenNetwork(Delegating):
    """A compact network as a graph of operators.

    Its parameters and buffers have the same names as in the model. It can be trained, saved, copied, exported and
    pruned again. The modules that hold its tensors are no layers, so none can be replaced, and none can be called.

    It has the model's attributes (``names``, ``stride``, ``num_classes``), and its methods, properties and class
    attributes. A method runs on this network: one that calls the network, reads attributes and parameters, or calls a
    module that ``forward`` does not run (a loss), works; one that calls a layer is refused, with the name of the layer.
    What ``nn.Module`` has is torch's own, also where the model's class overrides it (``train``, ``_apply``): what these
    do to a run is in the graphs. It is no instance of the model's class.

    Args:
        compact: holds the compact parameters, buffers and attributes, which are taken over.
        program: what to run.
        must_hold: tells from the name of a module, and the module, whether the graphs run it.
    """

    _program: Program

    def __init__(self, compact: nn.Module, program: Program, must_hold: Callable[[str, nn.Module], bool]) -> None:
        super().__init__()
        hold(self, compact, must_hold)
        self._program = program
        self.train(compact.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns.

        Raises:
            ValueError: for other arguments than those that were traced, or if the graph does not hold for their sizes.
            RuntimeError: in train mode, if the model could not be traced in train mode; or if a tensor is missing,
                because a module was replaced.
        """
        graph, program = self._program.graphs[self.training], self._program
        if isinstance(graph, str):
            raise RuntimeError(graph)
        given = program.signature.bind(*args, **kwargs).arguments
        if list(given) != program.arguments:
            raise ValueError(f"got arguments {list(given)}; this network was traced with {program.arguments}")
        inputs = pytree.tree_leaves(given)
        self._require_sizes(inputs)
        tensors = [self._tensor(name) for name in program.takes[self.training]]
        with restore_modes():
            return pytree.tree_unflatten(graph.module(*inputs, *tensors), graph.results)

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor that a graph takes."""
        if name in self._program.fixed:
            return self._program.fixed[name]
        try:
            tensor: Tensor = attribute_of(self, name)
        except AttributeError as error:
            raise RuntimeError(
                f"{name!r} is gone, and this network's graph needs it: modules of a rewritten graph cannot be "
                "replaced, removed or fused"
            ) from error
        return tensor

    def _require_sizes(self, inputs: list[Any]) -> None:
        """Refuse inputs if the graph does not hold for them."""
        traced, guards = self._program.shapes, self._program.guards.get(self.training, Guards())
        if len(inputs) != len(traced) or not all(isinstance(x, Tensor) for x in inputs):
            kinds = ", ".join(type(x).__name__ for x in inputs[:5])
            raise ValueError(f"got {len(inputs)} inputs ({kinds}); this network was traced with {len(traced)} tensors")
        shapes = [(shape[0], *x.shape[1:]) for x, shape in zip(inputs, traced, strict=True)]
        if guards.record(shapes):
            return
        for x, shape, wanted in zip(inputs, traced, shapes, strict=True):
            given = f"got an input of shape {tuple(x.shape)}; this network was traced with {shape}"
            if not (self._program.any_batch or x.shape[0] == shape[0]):
                raise ValueError(f"{given}; its graph holds for this batch size only")
            if wanted != shape and (unmet := guards.unmet(shapes)) is not None:
                raise ValueError(f"{given}; {unmet}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RewrittenNetwork:
        """Apply a function to all tensors: move them, or change their precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._program.fixed.update({name: fn(tensor) for name, tensor in self._program.fixed.items()})
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle: the class is made again for the signature."""
        return make_network, (self._program.signature, self._held_kind), vars(self)


def class_for(signature: inspect.Signature) -> type[RewrittenNetwork]:
    """Return the class of networks whose ``forward`` has this signature: one for equal signatures, as of copies."""
    try:
        return make_class(signature)
    except TypeError:  # a default value, a list say, that is no key of a cache
        return make_class.__wrapped__(signature)


@functools.cache
def make_class(signature: inspect.Signature) -> type[RewrittenNetwork]:
    """Make a class whose ``forward`` has this signature, for exporters, which ask for its names."""

    def forward(self: RewrittenNetwork, *args: Any, **kwargs: Any) -> Any:
        return RewrittenNetwork.forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = RewrittenNetwork.forward.__doc__
    names = {"__module__": __name__, "__doc__": RewrittenNetwork.__doc__, "forward": forward}
    return type("RewrittenNetwork", (RewrittenNetwork,), names)


def make_network(signature: inspect.Signature, kind: type[nn.Module]) -> Delegating:
    """Return a network whose state is yet to be set."""
    return make_empty(class_for(signature), kind)


def rewrite_network(
    plan: PruningPlan, model: nn.Module, compact: nn.Module, traced: Traced | None = None
) -> RewrittenNetwork:
    """Return the compact network as a rewritten graph.

    Args:
        plan: what stays.
        model: the full model.
        compact: its copy with compact tensors, which are shared.
        traced: the graphs of the model; None = traced here.

    Raises:
        PlanError: if the plan is for another model.
        RewriteError: if the graph cannot be rewritten; names the operator and the module.
        TraceError: if the model cannot be traced.
    """
    traced = traced if traced is not None else trace_graphs(model, plan.example(model))
    try:
        opened = traced.derive(f"open sizes, {kind_of(model)}", lambda: open_sizes(model, traced))
        return rewrite_graphs(plan, model, compact, opened)
    except (PlanError, RewriteError, TraceError):  # the graph of fixed sizes says more about the channels
        return rewrite_graphs(plan, model, compact, traced)


def kind_of(model: nn.Module) -> str:
    """Return the devices and dtypes of a model's tensors, which the constants of an exported graph follow."""
    return ", ".join(sorted({f"{x.dtype} on {x.device}" for x in state_of(model).values()}))


def open_sizes(model: nn.Module, traced: Traced) -> Traced:
    """Return the same graphs with the sizes of images left open, where the model's code allows it."""
    evaluation, guards = export_for_sizes(model, traced.inputs, training=False)
    if traced.training is None:
        return replace(traced, evaluation=evaluation, any_batch=True, guards={False: guards})
    training, in_training = export_for_sizes(model, traced.inputs, training=True)
    both = {False: guards, True: in_training}
    return replace(traced, evaluation=evaluation, training=training, any_batch=True, guards=both)


def rewrite_graphs(plan: PruningPlan, model: nn.Module, compact: nn.Module, traced: Traced) -> RewrittenNetwork:
    """Return the compact network in these graphs, rewritten; where none is of train mode, one is traced if possible."""
    state = Propagation(exact=False, norms={norm.module for norm in plan.norms}, heads=True)
    labels = {False: run_on_labels(traced.evaluation, traced.inputs, state, record=True)}
    if traced.training is not None:
        labels[True] = run_on_labels(traced.training, traced.inputs, state, record=False)
    keep = kept_labels(plan, state)
    missing = ""
    if traced.training is None:
        try:
            added = traced.derive(f"training, {kind_of(model)}", lambda: add_training(model, traced))
            assert added.training is not None
            labels[True] = run_on_labels(added.training, traced.inputs, state, record=False)
            keep = kept_labels(plan, state)
            traced = added
        except TraceError as error:
            missing = f"this network cannot run in train mode: its model could not be traced there: {error}"
        except PlanError as error:
            missing = f"this network cannot run in train mode: {error}"
    graphs: dict[bool, RewrittenGraph | str] = {}
    fixed: dict[str, Tensor] = {}
    takes: dict[bool, list[str]] = {}
    own = set(state_of(model))
    for mode, graph in ((False, traced.evaluation), (True, traced.training)):
        if graph is None:
            graphs[mode] = missing
            continue
        graphs[mode] = new = rewrite(graph, labels[mode], state.selections, keep, plan.norms)
        indices = {f"index {place} of {'train' if mode else 'eval'} mode": x for place, x in enumerate(new.indices)}
        fixed |= {name: attribute_of(graph, name) for name in new.tensors if name not in own} | indices
        takes[mode] = [*new.tensors, *indices]
    signature = inspect.signature(model.forward)
    arguments = list(signature.bind(*traced.inputs.args, **traced.inputs.kwargs).arguments)
    shapes = [tuple(x.shape) for x in traced.inputs.tensors]
    program = Program(graphs, fixed, takes, signature, arguments, shapes, traced.any_batch, dict(traced.guards))
    return class_for(signature)(compact, program, run_by(compact, traced, takes))


def run_by(compact: nn.Module, traced: Traced, takes: Mapping[bool, list[str]]) -> Callable[[str, nn.Module], bool]:
    """Return what tells whether the graphs run a module, or use a tensor of it; see ``hold``."""
    entered: set[str] = set()
    for graph in (traced.evaluation, traced.training):
        for node in graph.graph.nodes if graph is not None else ():
            stack = (node.meta.get("nn_module_stack") or {}).values()
            entered |= {str(entry[0]).removeprefix("L['self'].").partition("@")[0] for entry in stack}
    tensors = state_of(compact)
    used = {id(tensors[name]) for names in takes.values() for name in names if name in tensors}

    def must_hold(name: str, module: nn.Module) -> bool:
        own = (*module._parameters.values(), *module._buffers.values())
        return name in entered or isinstance(module, Delegating) or any(id(tensor) in used for tensor in own)

    return must_hold


def add_training(model: nn.Module, traced: Traced) -> Traced:
    """Trace the graph of train mode, too; open sizes stay open."""
    if traced.guards:
        training, guards = export_for_sizes(model, traced.inputs, training=True)
        return replace(traced, training=training, guards={**traced.guards, True: guards})
    training, any_batch = export(model, traced.inputs, training=True)
    return replace(traced, training=training, any_batch=traced.any_batch and any_batch)


def kept_labels(plan: PruningPlan, state: Propagation) -> npt.NDArray[np.bool_]:
    """Return for each label whether its channels stay.

    Raises:
        PlanError: if channels that the plan parts belong together, or channels that must stay go.
    """
    components, reasons = state.settle()
    if plan.exact:
        reasons = reasons | state.mixed_classes(components)
    kept, gone = (np.zeros(len(components), dtype=bool) for _ in range(2))
    for piece in plan.slices:
        known = state.dims.get(piece.place)
        if known is None:
            raise PlanError(f"the plan is for another model: {piece.tensor!r} has no channels along {piece.dim} here")
        classes = components[known.labels.numpy()]
        stays = np.isin(np.arange(len(classes)), plan.kept_indices(piece).numpy())
        kept[classes[stays]] = True
        gone[classes[~stays]] = True
        wrong = np.flatnonzero(gone & (kept | np.isin(np.arange(len(gone)), [0, *reasons])))
        if len(wrong):
            why = reasons.get(int(wrong[0]), "others that stay belong to them")
            raise PlanError(f"channels of {piece.tensor!r} that the plan removes cannot leave: {why}")
    return ~gone[components]
