"""Facts about one node of an exported graph: its operator, its module, its arguments and its sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fastprune.graph.export.refusals import TraceError


def operator_name(node: Node) -> str:
    """Return the operator's name without its overload and the underscore of in-place variants.

    PyTorch's operators have plain names ("add"). Others keep their namespace, so that a user's "mylib::add" is not
    taken for an addition.
    """
    schema = getattr(node.target, "_schema", None)
    name = str(schema.name).removeprefix("aten::") if schema else getattr(node.target, "__name__", "?")
    return name if name.startswith("_") else name.rstrip("_")


def module_of(node: Node) -> str:
    """Return the name of the module whose code made the node, "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [str(entry[0]) for entry in stack.values()]
    return path[-1].removeprefix("L['self'].") if path else ""


def concrete(size: int | torch.SymInt) -> int:
    """Return the value that a size had on the example."""
    if isinstance(size, torch.SymInt):
        if size.node.hint is None:
            raise TraceError(
                "the model makes a tensor whose size depends on the values of its input (nonzero, a boolean index); "
                "trace the part in front of it, or make it a custom operator (docs/custom_operators.md)"
            )
        return int(str(size.node.hint))
    return size


def argument_of(node: Node, name: str) -> Any:
    """Return an operator's argument by its name in the schema, or its default if it was not given."""
    for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if place < len(node.args):
                return node.args[place]
            return node.kwargs.get(name, argument.default_value if argument.has_default_value() else None)
    return None


def set_argument(node: Node, name: str, value: Any) -> None:
    """Set an operator's argument by its name in the schema."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def cut_places(node: Node, shape: tuple[int, ...]) -> tuple[int, list[int]]:
    """Return the dimension along which a slice cuts a value of ``shape``, and where: its start and end, if inside."""
    dim = int(argument_of(node, "dim")) % len(shape)
    size = shape[dim]
    bounds = (argument_of(node, "start"), argument_of(node, "end"))
    places = [bound + size if isinstance(bound, int) and bound < 0 else bound for bound in bounds]
    return dim, [place for place in places if isinstance(place, int) and 0 < place < size]
