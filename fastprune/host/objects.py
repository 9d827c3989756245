"""A user's own functions by name: ``file.py:name`` and ``package.module:name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fastprune.host.spelling import did_you_mean


def load_object(spec: str, what: str) -> Any:
    """Import what a user names; the current folder, or the file's, comes first on the path, as under ``python``.

    Args:
        spec: ``file.py:name`` or ``package.module:name``.
        what: what it is for, in messages: "model" say.

    Raises:
        ValueError: if there is no such file, module or name, or the import fails.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise ValueError(f"{what} {spec!r}: a function is named file.py:name or package.module:name")
    try:
        module = import_file(Path(source).expanduser()) if source.endswith(".py") else import_module(source)
    except Exception as error:  # whatever the user's code raises
        kind = "" if isinstance(error, (ImportError, FileNotFoundError)) else f"{type(error).__name__}: "
        raise ValueError(f"{what} {spec!r}: cannot import {source!r} ({kind}{error})") from error
    if not hasattr(module, name):
        hint = did_you_mean(name, dir(module), " ({})", most=3, show=str)
        raise ValueError(f"{what} {spec!r}: {source!r} has no function {name!r}{hint}")
    return getattr(module, name)


def names_object(spec: str) -> bool:
    """Return whether a text has the form ``file.py:name`` or ``package.module:name``."""
    source, colon, name = spec.rpartition(":")
    dotted = all(part.isidentifier() for part in source.split("."))
    return bool(colon) and name.isidentifier() and (source.endswith(".py") or dotted)


def is_there(spec: str) -> bool:
    """Return whether ``spec`` names a function in a file, or in a package that can be found."""
    source = spec.rpartition(":")[0]
    if not names_object(spec) or source.endswith(".py"):
        return names_object(spec)
    put_on_path(Path.cwd())
    return importlib.util.find_spec(source.partition(".")[0]) is not None


def import_module(name: str) -> ModuleType:
    """Import a module by its dotted name, also from the current folder."""
    put_on_path(Path.cwd())
    return importlib.import_module(name)


def import_file(path: Path) -> ModuleType:
    """Import a file as the module of its name, so that worker processes find it too."""
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    put_on_path(path.parent)
    name = path.stem if known is None else f"{path.stem}_{abs(hash(path)):x}"  # another module has the name
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def put_on_path(folder: Path) -> None:
    """Put a folder in front of the places where Python looks for modules."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
