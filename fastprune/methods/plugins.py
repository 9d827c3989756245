"""What packages say of the methods that they bring: the entry points of the group ``fastprune.methods``.

Nothing here imports a method, or torch.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from fastprune.host.spelling import did_you_mean
from fastprune.options import OptionInfo

GROUP = "fastprune.methods"


class PluginError(ValueError):
    """A plugin that cannot be used."""


class PluginWarning(UserWarning):
    """A plugin that is left out."""


@dataclass(frozen=True)
class MethodInfo:
    """What is known of an installed method.

    Args:
        name: what users type.
        package: the distribution that brings it.
        version: the version of that distribution.
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


def offers() -> dict[str, list[EntryPoint]]:
    """Return the entry points of each name; two different ones are two packages, or two lines of one package."""
    found: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        known = found.setdefault(point.name, [])
        if all((point.value, package_of(point)) != (other.value, package_of(other)) for other in known):
            known.append(point)
    return found


def offer_of(name: str) -> list[EntryPoint]:
    """Return the entry points of one name.

    Raises:
        ValueError: for an unknown name; lists the near ones, or all.
    """
    found = offers()
    if name not in found:
        hint = did_you_mean(name, found, most=3)
        if not hint and found:
            hint = f"there are {', '.join(sorted(found))}"
        if not hint:
            hint = "none is installed, not even fastprune's own: install fastprune as a package (pip install)"
        raise ValueError(f"no pruning method is called {name!r}: {hint}")
    return found[name]


def only_one(name: str, points: list[EntryPoint]) -> EntryPoint:
    """Return the entry point of a name.

    Raises:
        PluginError: if two packages offer the name.
    """
    if len(points) > 1:
        sources = " and ".join(f"{package_of(p)} {version_of(p)} ({p.value})" for p in points)
        raise PluginError(f"method {name!r} is offered by {sources}: uninstall one of them")
    return points[0]


def package_of(point: EntryPoint) -> str:
    """Return the name of the distribution that brings an entry point."""
    return point.dist.name if point.dist is not None else "an unnamed package"


def version_of(point: EntryPoint) -> str:
    """Return the version of that distribution."""
    return point.dist.version if point.dist is not None else "of unknown version"
