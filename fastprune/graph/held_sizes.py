"""Numbers of channels that a model's own code keeps as attributes: ``self.c`` in ``x.split((self.c, self.c))``."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import argument_of, cut_places, module_of, operator_name
from fastprune.graph.labels.labels import core, varying_dims
from fastprune.graph.labels.moves import PARTING, SELECTING
from fastprune.graph.rewrite import SIZED
from fastprune.graph.structure import HeldSize
from fastprune.graph.units import Units

# Functions and methods of torch with sizes, or places to cut at, among their arguments.
WITH_SIZES = {"view", "reshape", "expand", "unflatten", "split", "split_with_sizes", "narrow"}


def find_held_sizes(model: nn.Module, labels: Mapping[Node, Any], units: Units) -> tuple[HeldSize, ...]:
    """Return the attributes that hold the size of something that an operator of their module's code makes.

    Attributes count that are integers, or sequences of integers, and that a method of their class writes into the
    arguments of such an operator, as ``x.view(n, self.heads, -1)``. An attribute is listed once for each operator that
    its value fits; these may disagree, so whoever changes an attribute has to try the code.

    Args:
        model: the full model.
        labels: the labels of the values of its graphs.
        units: the units.
    """
    holders = holders_of(model)
    found: dict[Any, HeldSize] = {}
    for node, value in labels.items():
        held = holders.get(module_of(node))
        if node.op != "call_function" or held is None or operator_name(node) not in PARTING | set(SIZED) | SELECTING:
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
    kind: Any = type(module)
    written = size_names(kind) if any(value is not None for value in values.values()) else frozenset()
    return {name: value for name, value in values.items() if value is not None and name in written}


def as_integers(value: Any) -> int | tuple[int, ...] | None:
    """Return an integer, or a list or tuple of integers as a tuple; None for anything else."""
    if type(value) in (list, tuple) and value and all(type(x) is int for x in value):
        return tuple(value)
    return value if type(value) is int else None


@functools.cache
def size_names(kind: type) -> frozenset[str]:
    """Return the attributes that the methods of a class write into sizes; none where there is no source to read."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "builtins")):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        names |= {name for method in ast.walk(tree) if isinstance(method, FUNCTIONS) for name in names_in_sizes(method)}
    return frozenset(names)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def names_in_sizes(method: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the attributes of its object that a method writes into sizes and places to cut at."""
    if not method.args.args or method.name == "__init__":
        return
    own = method.args.args[0].arg
    sizes: list[ast.AST] = []
    for node in ast.walk(method):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            sizes += [*node.args, *node.keywords] if called in WITH_SIZES else []
        elif isinstance(node, ast.Slice):
            sizes += [bound for bound in (node.lower, node.upper) if bound is not None]
    for size in sizes:
        for part in ast.walk(size):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == own:
                yield part.attr


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
            counted = units_along(result, dim, units)
            if bool((counted != counted[:1]).any()):  # the same units everywhere: the size never changes
                yield result.size(dim), (counted,)
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
