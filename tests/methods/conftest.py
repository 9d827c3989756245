"""Packages with methods, installed for the duration of a test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def write_distribution(folder: Path, package: str, points: dict[str, str], version: str = "1.0") -> Path:
    """Write the metadata of an installed package with methods."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[fastprune.methods]\n{lines}")
    return folder


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that installs a package with given modules and entry points for the duration of a test."""

    def install(package: str, points: dict[str, str], modules: dict[str, str] | None = None) -> None:
        folder = tmp_path / package
        write_distribution(folder, package, points)
        for name, code in (modules or {}).items():
            (folder / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(folder)

    yield install
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]
