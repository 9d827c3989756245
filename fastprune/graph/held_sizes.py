"""Numbers of channels that a model's own code keeps as attributes: ``self.c`` in ``x.split((self.c, self.c))``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import argument_of, cut_places, module_of, operator_name
from fastprune.graph.labels.labels import core, varying_dims
from fastprune.graph.labels.moves import PARTING, SELECTING
from fastprune.graph.structure import HeldSize
from fastprune.graph.units import Units

SIZED = {"view", "_unsafe_view", "reshape", "expand", "unflatten"}  # operators with sizes among their arguments


def find_held_sizes(model: nn.Module, labels: Mapping[Node, Any], units: Units) -> tuple[HeldSize, ...]:
    """Return the attributes that hold the size of something that an operator of their module's code makes.

    Operators count that have sizes among their arguments, and attributes that are integers, or sequences of integers,
    and that a method other than ``__init__`` reads. An attribute is listed once for each operator that its value fits;
    these may disagree, and a value may fit by accident, so whoever changes an attribute has to try the code.

    Args:
        model: the full model.
        labels: the labels of the values of its graphs.
        units: the units.
    """
    holders = holders_of(model)
    found: dict[Any, HeldSize] = {}
    for node, value in labels.items():
        held = holders.get(module_of(node))
        if node.op != "call_function" or held is None or operator_name(node) not in PARTING | SIZED | SELECTING:
            continue
        for full, counted in sizes_of(node, value, labels, units):
            for name, own in held.items():
                if own == full:
                    path = f"{module_of(node)}.{name}".removeprefix(".")
                    found[path, tuple(units.numpy().tobytes() for units in counted)] = HeldSize(path, counted)
    return tuple(found.values())


def holders_of(model: nn.Module) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Return {module: {attribute that may be numbers of channels: its value}}."""
    found = {name: integers_of(module) for name, module in model.named_modules()}
    return {name: held for name, held in found.items() if held}


def integers_of(module: nn.Module) -> dict[str, int | tuple[int, ...]]:
    """Return the attributes of a module that may be numbers of channels; torch's own layers have none."""
    if type(module).__module__.startswith("torch."):
        return {}
    values = {name: as_integers(value) for name, value in vars(module).items()}
    read = names_read(type(module)) if any(value is not None for value in values.values()) else set()
    return {name: value for name, value in values.items() if value is not None and name in read}


def as_integers(value: Any) -> int | tuple[int, ...] | None:
    """Return an integer, or a sequence of integers as a tuple; None for anything else."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, int) for x in value):
        return tuple(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def names_read(kind: type) -> set[str]:
    """Return the names that the methods of a module's class mention, other than ``__init__``."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    functions = [getattr(f, "fget", f) for base in own for name, f in vars(base).items() if name != "__init__"]
    return {name for f in functions if hasattr(f, "__code__") for name in names_in(f.__code__)}


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the names that compiled code mentions, functions inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def sizes_of(
    node: Node, value: Any, labels: Mapping[Node, Any], units: Units
) -> Iterator[tuple[int | tuple[int, ...], tuple[Tensor, ...]]]:
    """Yield sizes that may shrink and what they count: of a node's results, of all its parts, up to where it cuts.

    Args:
        node: a node that moves channels.
        value: the labels of its results.
        labels: the labels of all values.
        units: the units.
    """
    results = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
    for result in results:
        for dim in varying_dims(result):
            yield result.size(dim), (units_along(result, dim, units),)
    if operator_name(node) in PARTING and results:
        dim = int(argument_of(node, "dim")) % results[0].dim()
        yield tuple(part.size(dim) for part in results), tuple(units_along(part, dim, units) for part in results)
    source = labels.get(node.all_input_nodes[0]) if node.all_input_nodes else None
    if operator_name(node) == "slice" and isinstance(source, Tensor):
        dim, bounds = cut_places(node, tuple(source.shape))
        for place in bounds:
            yield place, (units_along(source.narrow(dim, 0, place), dim, units),)


def units_along(labels: Tensor, dim: int, units: Units) -> Tensor:
    """Return the units at each index along a dimension, [size, number of different ones at an index]."""
    found: Tensor = torch.from_numpy(units.find(core(labels))).movedim(dim, 0)
    rows: Tensor = torch.unique(found.reshape(len(found), -1), dim=1)
    return rows.expand(labels.size(dim), -1)
