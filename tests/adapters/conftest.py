"""Ultralytics keeps to the folder of a test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def keep_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Ultralytics' settings and results in the test's folder, and let it install and fetch nothing."""
    for name, value in {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
