"""Models that cannot be traced, and what their owners can do about it."""

from __future__ import annotations

import linecache
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

QUANTISED = (
    *("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized"),
    *("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize"),
)
WRAPPERS = {  # {class that wraps a network: the attribute that holds the network}
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
BY_VALUE = (
    "its Python code decides by the values of a tensor (an if, a loop, int() or float()), and a graph holds for all "
    "values",
    "write it as torch.where or torch.cond, or as a custom operator (docs/custom_operators.md)",
)


class TraceError(ValueError):
    """The model cannot be exported, so nothing is known about its channels."""


def refuse(model: nn.Module) -> None:
    """Refuse models on which the exporter fails with a message of its own, or worse.

    Raises:
        TraceError: if a module is wrapped, scripted, quantised or uninitialised; names the module.
    """
    for name, module in model.named_modules():
        where = repr(name) if name else "the model"
        reason = reason_of_kind(name, module) or reason_of_tensors(module)
        if reason is not None:
            raise TraceError(f"{where} {reason}")


def reason_of_kind(name: str, module: nn.Module) -> str | None:
    """Return why a module of this class cannot be traced, None if it can."""
    kind = type(module).__name__
    if kind in WRAPPERS and type(module).__module__.startswith("torch."):
        inner = f"{expression_of(name)}.{WRAPPERS[kind]}"
        return f"is a {kind}: give the network that it wraps ({inner}), and wrap the compact one"
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule: give the module that was scripted, and script the compact one"
    if isinstance(module, GraphModule) and "train" in vars(module):
        return "is an exported program: give the module that was exported"
    if type(module).__module__.startswith(QUANTISED):
        return f"is quantised ({kind}): prune the float model, and quantise the compact one"
    return None


def reason_of_tensors(module: nn.Module) -> str | None:
    """Return why a module with these parameters and buffers cannot be traced, None if it can."""
    for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if is_lazy(tensor):
            return (
                f"is not initialised (its {attribute} has no shape yet): run the model once, model(example), before "
                "you trace it"
            )
        if tensor.is_quantized:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"is quantised (its {attribute} is {dtype}): prune the float model, and quantise the compact one"
    return None


def expression_of(name: str) -> str:
    """Return the Python expression for a module; parts of its name may be numbers."""
    if not all(part.isidentifier() for part in name.split(".")):
        return f"model.get_submodule({name!r})" if name else "model"
    return f"model.{name}"


def explain(model: nn.Module, error: Exception) -> str:
    """Turn the exporter's error into a message: why a model cannot be exported, where in its code, and what to do."""
    reason, advice = reason_of(error)
    place = place_of(model, error)
    parts = (f"{type(model).__name__} cannot be traced: {reason}", f" ({place})" if place else "")
    return "".join(parts) + (f"; {advice}" if advice else "")


def reason_of(error: Exception) -> tuple[str, str]:
    """Return the reason, in plain words if it is a frequent one, and what to do."""
    text = " ".join(str(error).split())
    if "DataDependent" in type(error).__name__ or "data-dependent" in text:
        return BY_VALUE
    if ".numpy()" in text:
        return "it leaves torch for NumPy", "make what is computed there a custom operator (docs/custom_operators.md)"
    if "not a known type" in text or "register a pytree" in text:
        kind = text.partition("<class '")[2].partition("'>")[0]
        return (
            f"it takes or returns a {kind or 'container'}, which the exporter does not look into",
            "register the class with torch.export.register_dataclass, or return a tuple or a dict",
        )
    if type(error).__name__ == "AssertionError" and not text:
        return "an assertion in its code fails", ""
    return f"{type(error).__name__}: {text[:200].rstrip()}{'…' if len(text) > 200 else ''}", ""


def place_of(model: nn.Module, error: Exception) -> str:
    """Return the innermost module, and the innermost line of code that is not torch's own."""
    names = {id(module): name for name, module in model.named_modules()}
    inside, line = None, ""
    own = str(Path(torch.__file__).parent)
    for frame, number in frames_of(error):
        module = frame.f_locals.get("self")
        if id(module) in names:
            inside = names[id(module)]
        file = frame.f_code.co_filename
        if inside is not None and not file.startswith((own, "<")):
            code = linecache.getline(file, number).strip()
            line = f"{file}:{number}" + (f": {code}" if code else "")
    return ", ".join(part for part in (f"in {inside!r}" if inside else "", line) if part)


def frames_of(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    """Yield the frames of an exception's traceback, the innermost last, each with the line where it was left."""
    at = error.__traceback__
    while at is not None:
        yield at.tb_frame, at.tb_lineno
        at = at.tb_next
