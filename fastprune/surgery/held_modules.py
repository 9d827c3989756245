"""The modules of a network whose graph is rewritten: they hold tensors and attributes, and their code does not run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import GraphModule

# Containers without code of their own. They stay what they are, with held modules in them.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
OWN = frozenset(vars(nn.Module()))  # what every module keeps: parameters, buffers, hooks, mode, …


class LayerCallError(RuntimeError):
    """A layer was called by itself, in a network that runs a rewritten graph."""


class Delegating(nn.Module):
    """A module with what the class of another one defines: methods, properties and class attributes.

    What torch's ``Module`` has (``forward``, ``train``, ``state_dict``, …) and special methods are not taken over.
    """

    _held_kind: type[nn.Module] = nn.Module  # the class of the model's module

    def __getattr__(self, name: str) -> Any:
        """Return a parameter, a buffer or a module; else what the model's class defines under this name.

        Raises:
            AttributeError: if there is none, or if it is a property that runs a layer.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = find_definition(self._held_kind, name)
            if found is None:
                raise
        try:
            return found(self)
        except LayerCallError as error:
            raise AttributeError(f"{name!r} of {self._held_kind.__name__} runs a layer: {error}") from error

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle: the class of the model's module comes first, since state may hold methods of this module."""
        return make_empty, (type(self), self._held_kind), vars(self)

    def __dir__(self) -> list[str]:
        """List the names that the model's class defines, too."""
        own: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return sorted({*own, *(name for name in dir(self._held_kind) if not is_special(name))})


class HeldModule(Delegating):
    """Holds a module's tensors, attributes and inner modules; its code does not run."""

    _held_name: str = ""  # the module's name in the network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to run.

        Raises:
            LayerCallError: always.
        """
        raise LayerCallError(
            f"{self._held_name!r} ({self._held_kind.__name__}) cannot be called by itself: this network runs a "
            "rewritten graph, not the code of its layers; call the network, or prune with trace(rewrite=False) "
            "(--keep_class), which keeps the model's class"
        )

    def extra_repr(self) -> str:
        """Return the class of the module."""
        return self._held_kind.__name__


class HeldSequential(HeldModule, nn.Sequential):
    """A sequence of modules: it can be indexed, and it does not run."""


def make_empty(holder: type[Delegating], kind: type[nn.Module]) -> Delegating:
    """Return a module whose state is yet to be set."""
    empty = holder.__new__(holder)
    vars(empty)["_held_kind"] = kind
    return empty


def is_special(name: str) -> bool:
    """Return whether a name is one that Python itself looks up, such as ``__deepcopy__``."""
    return name.startswith("__") and name.endswith("__")


def find_definition(kind: type[nn.Module], name: str) -> Callable[[nn.Module], Any] | None:
    """Return what gives a module the attribute that its class defines under a name; None if the class has none."""
    if is_special(name):
        return None
    for base in kind.__mro__:
        if name in vars(base):
            value = vars(base)[name]
            return lambda module: value.__get__(module, kind) if hasattr(type(value), "__get__") else value
    return None


def hold(holder: nn.Module, model: nn.Module, must_hold: Callable[[str, nn.Module], bool]) -> None:
    """Give ``holder`` the tensors, inner modules and attributes of ``model``, which it must be the only one to use.

    Tensors are shared. Attributes are copied; where they refer to modules, the copies refer to what holds them. An
    inner module that the graph does not run, a loss say, stays as it is, and its code runs when it is called.

    Args:
        holder: an empty module.
        model: the compact network.
        must_hold: tells from the name of an inner module, and the module, whether the graph runs it.
    """
    held: dict[nn.Module, nn.Module] = {model: holder}
    shared: dict[int, Any] = {}
    hold_tensors(holder, model, "", must_hold, held, shared)
    copies = {**shared, **{id(old): new for old, new in held.items()}}
    for old, new in held.items():
        if not isinstance(old, GraphModule):  # a traced model has no attributes of its own
            names = [
                name for name in vars(old) if name not in OWN and not (old is not new and hasattr(type(new), name))
            ]
            vars(new).update({name: copy_attribute(vars(old)[name], copies) for name in names})


def copy_attribute(value: Any, copies: dict[int, Any]) -> Any:
    """Return a copy of an attribute, or the attribute itself if it cannot be copied (a lock, an open file)."""
    try:
        return copy.deepcopy(value, copies)
    except Exception:  # its own code may raise anything
        return value


def hold_tensors(
    holder: nn.Module,
    model: nn.Module,
    prefix: str,
    must_hold: Callable[[str, nn.Module], bool],
    held: dict[nn.Module, nn.Module],
    shared: dict[int, Any],
) -> None:
    """Give ``holder`` the tensors of ``model`` under the same names, and modules that hold those of the inner ones.

    Args:
        holder: the module to fill.
        model: the module to take from.
        prefix: begins the names of the inner modules.
        must_hold: as for ``hold``.
        held: {module: what holds it}; inner modules are added.
        shared: {id: object} of tensors and modules that are not copied; added to.
    """
    if isinstance(holder, Delegating):
        holder._held_kind = nn.Module if isinstance(model, GraphModule) else class_of(model)  # a graph defines nothing
    for name, parameter in model._parameters.items():
        holder.register_parameter(name, parameter)
    for name, buffer in model._buffers.items():
        holder.register_buffer(name, buffer, persistent=name not in model._non_persistent_buffers_set)
    shared |= {id(x): x for x in (*model._parameters.values(), *model._buffers.values()) if x is not None}
    for name, child in model._modules.items():
        if child is not None and child not in held:
            path = f"{prefix}{name}"
            if any(must_hold(f"{path}.{inner}".rstrip("."), module) for inner, module in child.named_modules()):
                held[child] = inner_holder = make_holder(child, path)
                hold_tensors(inner_holder, child, f"{path}.", must_hold, held, shared)
            else:
                held |= {module: module for module in child.modules() if module not in held}
                shared |= {id(x): x for x in (*child.parameters(), *child.buffers())}
        holder.add_module(name, None if child is None else held[child])


def make_holder(module: nn.Module, name: str) -> nn.Module:
    """Return an empty module that is to hold another one."""
    if type(module) in CONTAINERS:
        container: nn.Module = type(module).__new__(type(module))
        nn.Module.__init__(container)
        return container
    holder = HeldSequential() if isinstance(module, nn.Sequential) else HeldModule()
    holder._held_name = name
    return holder


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, of a held one that of the model's module."""
    return module._held_kind if isinstance(module, Delegating) else type(module)
