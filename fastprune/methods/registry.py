"""Where methods come from: the entry-point group ``fastprune.methods``, for the built-in ones as for anybody else's.

A package that declares

    [project.entry-points."fastprune.methods"]
    mymethod = "mypackage.mymethod:MyMethod"

adds a method by being installed. A plugin that cannot be used is reported by name and never breaks the others.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import inspect
import warnings
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

from fastprune.methods.contract import Method
from fastprune.options import OptionInfo, build, describe

GROUP = "fastprune.methods"

_warned: set[tuple[str, str]] = set()


class PluginError(ValueError):
    """A plugin that cannot be used."""


class PluginWarning(UserWarning):
    """A plugin that is left out."""


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """What is known of an installed method.

    Args:
        name: what users type.
        package: the distribution that brings it.
        version: of that distribution.
        paper: the publication; "" for a folklore baseline.
        summary: first paragraph of the class's docstring, on one line.
        needs_data: whether it searches on training data.
        options: its options.
    """

    name: str
    package: str
    version: str
    paper: str
    summary: str
    needs_data: bool
    options: tuple[OptionInfo, ...]


def available() -> dict[str, MethodInfo]:
    """The methods that can be used, by name, in alphabetical order.

    Warns:
        PluginWarning: once for each plugin that is left out, with the reason; see ``broken``.
    """
    usable, _ = _survey()
    return usable


def broken() -> dict[str, str]:
    """The plugins that cannot be used: {name: reason, with the package's name}."""
    _, faults = _survey()
    return faults


def load(name: str) -> type[Method]:
    """The method class called ``name``.

    Raises:
        ValueError: for an unknown name; lists the near ones, or all.
        PluginError: where the plugin of this name is broken, or two packages offer one.
    """
    offers = _offers()
    if name not in offers:
        near = difflib.get_close_matches(name, offers, n=3)
        if near:
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        elif offers:
            hint = f"there are {', '.join(sorted(offers))}"
        else:
            hint = "none is installed, not even fastprune's own: install fastprune as a package (pip install)"
        raise ValueError(f"no pruning method is called {name!r}: {hint}")
    return _resolve(name, offers[name])


def configure(method_class: type[Method], options: Mapping[str, Any]) -> Any:
    """A ``Config`` of the method with ``options`` in place of its defaults.

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


def class_fault(method_class: Any, name: str | None = None) -> str | None:
    """Why ``method_class`` cannot serve as a method, or None.

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


def _offers() -> dict[str, list[EntryPoint]]:
    """The entry points of each name; two different ones are two packages, or two lines of one package."""
    offers: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        known = offers.setdefault(point.name, [])
        if all((point.value, _package(point)) != (other.value, _package(other)) for other in known):
            known.append(point)
    return offers


def _survey() -> tuple[dict[str, MethodInfo], dict[str, str]]:
    """The usable methods, and why the others are not."""
    usable: dict[str, MethodInfo] = {}
    faults: dict[str, str] = {}
    for name, points in sorted(_offers().items()):
        try:
            usable[name] = _info(_resolve(name, points), points[0])
        except PluginError as error:
            faults[name] = str(error)
            if (name, faults[name]) not in _warned:
                _warned.add((name, faults[name]))
                warnings.warn(f"left out: {faults[name]}", PluginWarning, stacklevel=3)
    return usable, faults


def _resolve(name: str, points: list[EntryPoint]) -> type[Method]:
    """The class behind the entry points of one name."""
    if len(points) > 1:
        sources = " and ".join(f"{_package(p)} {_version(p)} ({p.value})" for p in points)
        raise PluginError(f"method {name!r} is offered by {sources}: uninstall one of them")
    source = f"method {name!r} of package {_package(points[0])!r}"
    try:
        method_class = points[0].load()
    except (Exception, SystemExit) as error:  # whatever a third party's module does when it is imported
        raise PluginError(f"{source} cannot be imported: {type(error).__name__}: {error}") from error
    fault = class_fault(method_class, name)
    if fault is not None:
        raise PluginError(f"{source} is no valid method: {fault}")
    return method_class  # type: ignore[no-any-return]


def _info(method_class: type[Method], point: EntryPoint) -> MethodInfo:
    return MethodInfo(
        name=method_class.name,
        package=_package(point),
        version=_version(point),
        paper=method_class.paper,
        summary=" ".join((inspect.getdoc(method_class) or "").split("\n\n")[0].split()),
        needs_data=bool(method_class.needs_data),
        options=describe(method_class.Config),
    )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unnamed package"


def _version(point: EntryPoint) -> str:
    return point.dist.version if point.dist is not None else "of unknown version"
