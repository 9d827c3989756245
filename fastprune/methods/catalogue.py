"""Descriptions of the installed methods, remembered between processes: listing methods need not import torch.

A description is remembered with everything that it follows from: the entry point, the version of its package, the
sources of the package and of fastprune, the Python version, and the folders that packages are installed in. When one
of these changes, the method is imported and described again. Plugins that are broken are never remembered.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from fastprune.host import atomic
from fastprune.host.cache import cache_folder
from fastprune.methods.plugins import MethodInfo, PluginError, offer_of, offers, only_one, package_of, version_of
from fastprune.options import OptionInfo


def survey() -> tuple[dict[str, MethodInfo], dict[str, str]]:
    """Return the usable methods by name, in alphabetical order, and why the others cannot be used."""
    usable: dict[str, MethodInfo] = {}
    faults: dict[str, str] = {}
    with Memory() as memory:
        for name, points in sorted(offers().items()):
            try:
                usable[name] = memory.describe(name, points)
            except PluginError as error:
                faults[name] = str(error)
    return usable, faults


def find(name: str) -> MethodInfo:
    """Return the description of one method.

    Raises:
        ValueError: for an unknown name; lists the near ones, or all.
        PluginError: if the plugin of this name is broken, or two packages offer one.
    """
    with Memory() as memory:
        return memory.describe(name, offer_of(name))


class Memory:
    """The remembered descriptions of one environment; written to disk at the end if there are new ones."""

    def __init__(self) -> None:
        environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:16]
        self.path = cache_folder("methods") / f"{environment}.json"
        self.entries = read_entries(self.path)
        self.changed = False
        self.state_of = cache(state_of)  # for this object's life only: files may change after it

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *error: object) -> None:
        if self.changed:
            with suppress(OSError):  # without a place to write, the next call describes the methods again
                self.path.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_text(self.path, json.dumps(self.entries, indent=1) + "\n")

    def describe(self, name: str, points: list[EntryPoint]) -> MethodInfo:
        """Return the description of a method, from memory if nothing has changed that it follows from.

        Raises:
            PluginError: if the plugin is broken, or two packages offer the name.
        """
        key = self.key(only_one(name, points))
        known = recall(self.entries.get(name), key)
        if known is not None:
            return known
        from fastprune.methods.registry import info  # imports torch

        described = info(name, points)
        entry = {"key": key, "info": remember(described)}
        if recall(entry, key) == described:  # False for a default that is no plain value
            self.entries[name], self.changed = entry, True
        return described

    def key(self, point: EntryPoint) -> str:
        """Return a digest of everything that a description follows from."""
        package = point.value.partition(":")[0].partition(".")[0].strip()
        facts = (
            *(point.name, point.value, package_of(point), version_of(point), sys.version, installed()),
            *(self.state_of("fastprune"), self.state_of(package)),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def read_entries(path: Path) -> dict[str, Any]:
    """Return what the file holds; nothing if it is missing or spoilt."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def remember(info: MethodInfo) -> dict[str, Any]:
    """Return a description as JSON values; an option's default is written in Python, which tells () from []."""
    values = asdict(info)
    return {**values, "options": [{**option, "default": repr(option["default"])} for option in values["options"]]}


def recall(entry: Any, key: str) -> MethodInfo | None:
    """Return the description in an entry of the file; None if it is spoilt or has another key."""
    try:
        if entry["key"] != key:
            return None
        options = [{**option, "default": ast.literal_eval(option["default"])} for option in entry["info"]["options"]]
        return MethodInfo(**{**entry["info"], "options": tuple(OptionInfo(**option) for option in options)})
    except (KeyError, TypeError, ValueError, SyntaxError):
        return None


def installed() -> tuple[tuple[str, int], ...]:
    """Return the folders that modules are imported from, with their times: installing a package changes one.

    The first folder is the script's, or the current one: it says where the process was started.
    """
    found = []
    for folder in sys.path[1:]:
        with suppress(OSError):
            found.append((folder, os.stat(folder).st_mtime_ns))
    return tuple(found)


def state_of(package: str) -> tuple[tuple[str, int, int], ...]:
    """Return path, time and size of each module of a package, without importing it; empty for one that is missing."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return ()
    if spec is None:
        return ()
    folders = list(spec.submodule_search_locations or ())
    files = [path for folder in folders for path in modules_in(Path(folder))] if folders else [str(spec.origin)]
    found = []
    for path in sorted(set(files)):
        with suppress(OSError):
            status = os.stat(path)
            found.append((path, status.st_mtime_ns, status.st_size))
    return tuple(found)


def modules_in(folder: Path) -> Iterator[str]:
    """Yield the paths of all modules in a folder and in those below it."""
    suffixes = (*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES)
    for place, _, names in os.walk(folder):
        yield from (os.path.join(place, name) for name in names if name.endswith(suffixes))
