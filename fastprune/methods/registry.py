"""The installed methods: classes that come from the entry-point group ``fastprune.methods``, the built-in ones too.

A package that declares

    [project.entry-points."fastprune.methods"]
    mymethod = "mypackage.mymethod:MyMethod"

adds a method by being installed. A plugin that cannot be used is reported by name and never breaks the others.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

from fastprune.methods.contract import Method
from fastprune.methods.plugins import (
    MethodInfo,
    PluginError,
    PluginWarning,
    offer_of,
    offers,
    only_one,
    package_of,
    version_of,
)
from fastprune.options import build, describe

_warned: set[tuple[str, str]] = set()


def available() -> dict[str, MethodInfo]:
    """Return the methods that can be used, by name, in alphabetical order.

    Warns:
        PluginWarning: once for each plugin that is left out, with the reason; see ``broken``.
    """
    usable, _ = _survey()
    return usable


def broken() -> dict[str, str]:
    """Return the plugins that cannot be used: {name: reason, with the package's name}."""
    _, faults = _survey()
    return faults


def load(name: str) -> type[Method]:
    """Return the method class called ``name``.

    Raises:
        ValueError: for an unknown name; lists the near ones, or all.
        PluginError: if the plugin of this name is broken, or two packages offer one.
    """
    return resolve(name, offer_of(name))


def configure(method_class: type[Method], options: Mapping[str, Any]) -> Any:
    """Make a ``Config`` of the method with ``options`` in place of its defaults.

    Text is read as the option's type, so that values may come straight from a command line or from YAML.

    Args:
        method_class: the method.
        options: {name of the option: value}.

    Returns:
        An instance of ``method_class.Config``.

    Raises:
        ValueError: for an unknown option (lists the known ones) or a value out of range.
        TypeError: for a value of another type.
    """
    return build(method_class.Config, options, owner=f"method {method_class.name!r}")


def info(name: str, points: list[EntryPoint]) -> MethodInfo:
    """Import the method behind the entry points of one name and describe it.

    Raises:
        PluginError: see ``load``.
    """
    method_class, point = resolve(name, points), points[0]
    return MethodInfo(
        name=method_class.name,
        package=package_of(point),
        version=version_of(point),
        paper=method_class.paper,
        summary=" ".join((inspect.getdoc(method_class) or "").split("\n\n")[0].split()),
        needs_data=bool(method_class.needs_data),
        options=describe(method_class.Config),
    )


def resolve(name: str, points: list[EntryPoint]) -> type[Method]:
    """Import the class behind the entry points of one name.

    Raises:
        PluginError: see ``load``.
    """
    point = only_one(name, points)
    source = f"method {name!r} of package {package_of(point)!r}"
    try:
        method_class = point.load()
    except (Exception, SystemExit) as error:  # whatever a third party's module does when it is imported
        raise PluginError(f"{source} cannot be imported: {type(error).__name__}: {error}") from error
    fault = class_fault(method_class, name)
    if fault is not None:
        raise PluginError(f"{source} is no valid method: {fault}")
    return method_class  # type: ignore[no-any-return]


def class_fault(method_class: Any, name: str | None = None) -> str | None:
    """Return why ``method_class`` cannot serve as a method, or None.

    Args:
        method_class: what an entry point names.
        name: the entry point's name; None = whatever the class says.
    """
    if not isinstance(method_class, type):
        return f"{method_class!r} is no class"
    label = f"{method_class.__module__}.{method_class.__qualname__}"
    if not issubclass(method_class, Method):
        return f"{label} is no subclass of fastprune.methods.Method"
    if inspect.isabstract(method_class):
        return f"{label} does not implement {', '.join(sorted(method_class.__abstractmethods__))}"
    own = getattr(method_class, "name", None)
    if not isinstance(own, str) or not own:
        return f"{label} has no name"
    if name is not None and own != name:
        return f"{label} calls itself {own!r}, but its entry point says {name!r}"
    if not isinstance(method_class.paper, str):
        return f"{label}.paper is a {type(method_class.paper).__name__}, not a text"
    config_class = getattr(method_class, "Config", None)
    if not isinstance(config_class, type) or not dataclasses.is_dataclass(config_class):
        return f"{label}.Config is not a dataclass"
    try:
        describe(config_class)
    except Exception as error:  # a plugin's own code runs here
        return f"{label}.Config has no usable defaults or annotations: {type(error).__name__}: {error}"
    return None


def _survey() -> tuple[dict[str, MethodInfo], dict[str, str]]:
    """Return the usable methods, and why the others cannot be used."""
    usable: dict[str, MethodInfo] = {}
    faults: dict[str, str] = {}
    for name, points in sorted(offers().items()):
        try:
            usable[name] = info(name, points)
        except PluginError as error:
            faults[name] = str(error)
            if (name, faults[name]) not in _warned:
                _warned.add((name, faults[name]))
                warnings.warn(f"left out: {faults[name]}", PluginWarning, stacklevel=3)
    return usable, faults
