"""The network as a program of ``torch.export``, which runs without fastprune and without the model's code."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fastprune.graph.export.exporter import silence_exporter
from fastprune.graph.export.modes import mode_of
from fastprune.shipping.subject import ExportError, Subject

OWN_NAMESPACE = "fastprune"  # of the operators in fastprune.ops


def make_program(subject: Subject, batch: int | None) -> ExportedProgram:
    """Export a network.

    Args:
        subject: the network.
        batch: a fixed batch size; None = any.

    Raises:
        ExportError: if torch cannot export it, or not for any batch size, or if it calls operators of this package.
    """
    inputs = subject.examples(2 if batch is None else batch)
    bound = inspect.signature(subject.model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    size = Dim("batch", min=1)
    shapes = None if batch is not None else pytree.tree_map_only(Tensor, lambda _: {0: size}, dict(bound))
    try:
        with mode_of(subject.model, training=subject.model.training), silence_exporter():
            program = torch.export.export(
                subject.model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # the exporter raises what the model's own code raises
        hint = "; if its code fixes the batch size, give one: batch=8, or --batch 8" if batch is None else ""
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{type(subject.model).__name__} cannot be exported: {reason}{hint}") from error
    refuse_own_operators(program)
    return program


def refuse_own_operators(program: ExportedProgram) -> None:
    """Refuse a program that needs this package to run."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            namespace = getattr(node.target, "namespace", "")
            if node.op == "call_function" and namespace == OWN_NAMESPACE:
                raise ExportError(
                    f"the network calls {node.target}, which other runtimes do not have; export the compact network "
                    "that prune returns, without its gates"
                )


def program_bytes(subject: Subject, batch: int | None) -> tuple[bytes, Callable[[dict[str, Tensor]], list[Tensor]]]:
    """Return the content of a pt2 file, and a function that runs it."""
    buffer = io.BytesIO()
    torch.export.save(make_program(subject, batch), buffer)
    content = buffer.getvalue()
    network: Any = torch.export.load(io.BytesIO(content)).module()
    names = [spec.name for spec in subject.inputs]

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        given = list(zip(names, inputs.values(), strict=True))
        with torch.no_grad():
            results = network(*(x for name, x in given if name is None), **{name: x for name, x in given if name})
        return [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]

    return content, run
