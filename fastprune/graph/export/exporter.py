"""One call of ``torch.export``: a model in one mode becomes an operator graph on its own parameters."""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fastprune.graph.export.inputs import Inputs
from fastprune.graph.export.refusals import TraceError, explain
from fastprune.graph.export.regions import inline_regions
from fastprune.graph.model_state import mode_of

STACK_TRACES = "do_not_emit_stack_traces"  # a setting of torch.fx since 2.15; without it they only take time


def export(model: nn.Module, inputs: Inputs, *, training: bool) -> tuple[GraphModule, bool]:
    """Return the graph of ``model`` on its own parameters, and whether it holds for any batch size."""
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    any_batch = pytree.tree_map_only(Tensor, lambda _: {0: Dim.AUTO}, dict(bound))
    errors: list[Exception] = []
    with mode_of(model, training=training):
        for shapes in (any_batch, None):
            try:
                with silence_exporter():
                    program = torch.export.export(
                        model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
                    )
            except Exception as error:  # the exporter raises what the model's own code raises
                errors.append(error)
                continue
            module: Any = program.module(check_guards=False)
            inline_regions(module)
            return module, all(map(has_open_batch, module.graph.find_nodes(op="placeholder")))
    raise TraceError(explain(model, errors[-1])) from errors[-1]


def has_open_batch(node: Node) -> bool:
    """Return whether a graph leaves the batch size of an input open; the exporter does so where the model allows it."""
    size = node.meta["val"].shape[0]
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


@contextmanager
def silence_exporter() -> Iterator[None]:
    """Hide what the exporter prints before it raises (half a graph), and run compiled modules uncompiled.

    The warning that modules keep tensors of the export is hidden, too: ``mode_of`` restores them.
    """
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    was_disabled, log.disabled = log.disabled, True
    try:
        with (
            skip_bookkeeping(),
            torch.compiler.set_stance("force_eager"),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "The tensor attribute")
            yield
    finally:
        log.disabled = was_disabled


@contextmanager
def skip_bookkeeping() -> Iterator[None]:
    """Pause garbage collection during an export, and the recording of each node's source lines.

    An export makes millions of short-lived objects that refer to each other. This saves a tenth of its time for
    ResNet-50, more for larger networks.
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
