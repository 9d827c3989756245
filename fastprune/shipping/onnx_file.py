"""The network as ONNX, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastprune.graph.export.inputs import bind_arguments
from fastprune.shipping.program import make_program
from fastprune.shipping.subject import ExportError, Subject

LARGEST = 2**31 - 2**24
"""Bytes of weights that fit into one ONNX file: a protocol buffer holds less than 2 GiB."""

OLDEST_OPSET = 18
"""The oldest opset that torch writes."""


def onnx_bytes(
    subject: Subject, batch: int | None, opset: int | None
) -> tuple[bytes, Callable[[dict[str, Tensor]], list[Tensor]], int, list[str]]:
    """Return the content of an ONNX file, a function that runs it, its opset, and the names of its inputs.

    Raises:
        ExportError: without onnx, onnxscript and onnxruntime; or for a network that does not fit the format.
    """
    onnx, runtime = import_onnx()
    check_network(subject, opset)
    program = make_program(subject, batch)
    try:
        with silence_onnx():
            exported: Any = torch.onnx.export(
                program,
                input_names=input_names(subject),
                output_names=output_names(subject),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
            proto = exported.model_proto
    except Exception as error:  # operators without a translation, mostly
        raise ExportError(f"the network cannot be written as ONNX: {' '.join(str(error).split())[:300]}") from error
    version = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and version != opset:
        raise ExportError(f"opset: torch could not write this network in opset {opset}, but in {version}; give that")
    if batch is None:
        name_batch(proto.graph)
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    session = start_session(runtime, content)
    return content, lambda inputs: run_session(session, inputs), version, [x.name for x in session.get_inputs()]


def input_names(subject: Subject) -> list[str]:
    """Return the names of a file's inputs: "input" for one; several are named as the network's arguments."""
    if len(subject.inputs) == 1:
        return ["input"]
    names = list(bind_arguments(subject.model, subject.examples(2)))
    if len(names) == len(subject.inputs):
        return names
    return [f"input_{place}" for place in range(len(subject.inputs))]  # forward(*images) names them all alike


def output_names(subject: Subject) -> list[str] | None:
    """Return the names of a file's outputs: "output" for one; those of a dict by its keys; None = torch's choice."""
    with torch.no_grad():
        result = subject.examples(2).run(subject.model)
    if isinstance(result, Mapping) and all(isinstance(x, Tensor) and isinstance(n, str) for n, x in result.items()):
        names = list(result)
    else:
        leaves = pytree.tree_leaves(result)
        if not all(isinstance(x, Tensor) for x in leaves):
            return None
        names = ["output"] if len(leaves) == 1 else [f"output_{place}" for place in range(len(leaves))]
    return None if set(names) & set(input_names(subject)) else names


def name_batch(graph: Any) -> None:
    """Call the open dimension of a file's inputs "batch", wherever it occurs; torch's name for it is arbitrary."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info) if symbol else ():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)


def import_onnx() -> tuple[Any, Any]:
    """Import onnx and ONNX Runtime."""
    try:
        importlib.import_module("onnxscript")
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ExportError(f"format 'onnx' needs more packages: pip install 'fastprune[onnx]' ({error})") from error


def check_network(subject: Subject, opset: int | None) -> None:
    """Refuse a network that does not fit the format."""
    if opset is not None and opset < OLDEST_OPSET:
        raise ExportError(f"opset: got {opset}; torch writes {OLDEST_OPSET} and newer ones")
    tensors = [*subject.model.state_dict().values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > LARGEST:
        raise ExportError(
            f"the network's weights take {size / 2**30:.1f} GiB; one ONNX file holds less than 2 GiB, and weights in "
            "files beside it are not written; use format 'pt2'"
        )
    odd = {t.dtype for t in tensors if t.is_floating_point() and t.dtype not in (torch.float32, torch.float64)}
    if odd:
        raise ExportError(
            f"the network holds {str(odd.pop()).removeprefix('torch.')}; ONNX files are compared in float32: export "
            "model.float(), and let the runtime choose the precision"
        )


@contextlib.contextmanager
def silence_onnx() -> Any:
    """Hide what torch's exporter prints and warns of; its errors say the same."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


def start_session(runtime: Any, content: bytes) -> Any:
    """Load an ONNX file into ONNX Runtime."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen kinds
        raise ExportError(f"ONNX Runtime does not load the file: {' '.join(str(error).split())[:300]}") from error


def run_session(session: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Run an ONNX file on inputs in the order of the network's."""
    names = [node.name for node in session.get_inputs()]
    try:
        given = {name: x.numpy() for name, x in zip(names, inputs.values(), strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, given)]
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not run the file: {' '.join(str(error).split())[:300]}") from error
