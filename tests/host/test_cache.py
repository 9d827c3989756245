"""The cache folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from fastprune.host.cache import cache_folder


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"FASTPRUNE_CACHE": "/a"}, "/a/autotune"),
        ({"FASTPRUNE_CACHE": "a"}, "a/autotune"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/fastprune/autotune"),
        ({"HOME": "/c"}, "/c/.cache/fastprune/autotune"),
    ],
)
def test_cache_folder(variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTPRUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("autotune") == Path(folder)


def test_a_process_without_a_home_folder_uses_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTPRUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *args, **options: "~/.cache/fastprune")
    assert cache_folder("latency") == Path(tempfile.gettempdir()) / "fastprune" / "latency"
