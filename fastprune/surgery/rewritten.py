"""A compact network that runs its rewritten graph, because the model's own code cannot run it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastprune.graph.export.exporter import export
from fastprune.graph.export.inputs import Inputs
from fastprune.graph.export.open_sizes import Guards, export_for_sizes
from fastprune.graph.export.refusals import TraceError
from fastprune.graph.export.regions import restore_modes
from fastprune.graph.export.tracing import Traced, trace_graphs
from fastprune.graph.labels.interpret import run_on_labels
from fastprune.graph.labels.propagate import Propagation
from fastprune.graph.model_state import attribute_of, state_of
from fastprune.graph.plan import PlanError, PruningPlan
from fastprune.graph.rewrite import RewriteError, RewrittenGraph, rewrite


class RewrittenNetwork(nn.Module):
    """A compact network as a graph of operators.

    Its parameters and buffers have the same names as in the model. It can be trained, saved, copied, exported and
    pruned again. The modules that hold its tensors are no layers, so none can be replaced.

    Args:
        compact: holds the compact parameters and buffers, which are shared.
        constants: tensors of the model's code, by their names in the graphs.
        graphs: the graph for each mode, True = training, or the reason why there is none.
        signature: that of the model's ``forward``.
        inputs: what the network was traced with.
        any_batch: whether it takes batches of any size.
        guards: conditions on other input sizes, for the graph of each mode.
    """

    def __init__(
        self,
        compact: nn.Module,
        constants: dict[str, Tensor],
        graphs: dict[bool, RewrittenGraph | str],
        signature: inspect.Signature,
        inputs: Inputs,
        any_batch: bool,
        guards: Mapping[bool, Guards],
    ) -> None:
        super().__init__()
        hold_tensors(self, compact)
        for name, tensor in constants.items():
            self.register_buffer(constant_name(name), tensor, persistent=False)
        self._shapes = [tuple(x.shape) for x in inputs.tensors]
        self._any_batch = any_batch
        self._guards = dict(guards)
        self._signature = signature
        self._arguments = list(signature.bind(*inputs.args, **inputs.kwargs).arguments)
        self._results: dict[bool, pytree.TreeSpec] = {}
        self._takes: dict[bool, list[str]] = {}
        self._missing: dict[bool, str] = {}
        for mode, graph in graphs.items():
            if isinstance(graph, str):
                self._missing[mode] = graph
                continue
            name = "training_graph" if mode else "evaluation_graph"
            self.add_module(name, graph.module)
            self._results[mode] = graph.results
            self._takes[mode] = [constant_name(t) if t in constants else t for t in graph.tensors]
            for number, indices in enumerate(graph.indices):
                self.register_buffer(f"{name}_indices_{number}", indices, persistent=False)
                self._takes[mode].append(f"{name}_indices_{number}")
        self.train(compact.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns.

        Raises:
            ValueError: if the graph does not hold for the sizes of the inputs.
            RuntimeError: in train mode, if the model could not be traced in train mode.
        """
        mode = self.training
        if mode in self._missing:
            raise RuntimeError(self._missing[mode])
        given = self._signature.bind(*args, **kwargs).arguments
        if list(given) != self._arguments:
            raise ValueError(f"got arguments {list(given)}; this network was traced with {self._arguments}")
        inputs = pytree.tree_leaves(given)
        self.require_sizes(inputs)
        tensors = [attribute_of(self, name) for name in self._takes[mode]]
        graph: Any = self.training_graph if mode else self.evaluation_graph
        with restore_modes():
            return pytree.tree_unflatten(graph(*inputs, *tensors), self._results[mode])

    def require_sizes(self, inputs: list[Tensor]) -> None:
        """Refuse inputs if the graph does not hold for their sizes."""
        shapes = [(shape[0], *x.shape[1:]) for x, shape in zip(inputs, self._shapes, strict=True)]
        for x, shape, wanted in zip(inputs, self._shapes, shapes, strict=True):
            given = f"got an input of shape {tuple(x.shape)}; this network was traced with {shape}"
            if not (self._any_batch or x.shape[0] == shape[0]):
                raise ValueError(f"{given}; its graph holds for this batch size only")
            if wanted != shape and (unmet := self._guards.get(self.training, Guards()).unmet(shapes)) is not None:
                raise ValueError(f"{given}; {unmet}")


def constant_name(name: str) -> str:
    """Return the name of the buffer for a constant of the model's code."""
    return "constant_" + name.replace(".", "_")


def hold_tensors(holder: nn.Module, model: nn.Module) -> None:
    """Give ``holder`` the parameters and buffers of ``model``, under the same names."""
    for name, parameter in model._parameters.items():
        holder.register_parameter(name, parameter)
    for name, buffer in model._buffers.items():
        holder.register_buffer(name, buffer, persistent=name not in model._non_persistent_buffers_set)
    for name, child in model.named_children():
        inner = nn.Module()
        hold_tensors(inner, child)
        if inner._parameters or inner._buffers or inner._modules:
            holder.add_module(name, inner)


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
    results: dict[bool, RewrittenGraph | str] = {}
    constants: dict[str, Tensor] = {}
    own = set(state_of(model))
    for mode, graph in ((False, traced.evaluation), (True, traced.training)):
        if graph is None:
            results[mode] = missing
            continue
        results[mode] = new = rewrite(graph, labels[mode], state.selections, keep, plan.norms)
        constants |= {name: attribute_of(graph, name) for name in new.tensors if name not in own}
    signature = inspect.signature(model.forward)
    return RewrittenNetwork(compact, constants, results, signature, traced.inputs, traced.any_batch, traced.guards)


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
