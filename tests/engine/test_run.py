"""Run directories: existing ones are refused, new ones are complete or absent, and the log can be cut back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastprune.engine import RunDirectory, RunError


def test_create_and_open(tmp_path: Path) -> None:
    config = {"method": "ddnp", "options": {"epochs": 3, "lr": 1e-3, "none": None}}
    run = RunDirectory.create(tmp_path / "a" / "b", config)
    assert RunDirectory.open(run.path).config == config
    assert [path.name for path in run.path.parent.iterdir()] == ["b"]


def test_an_existing_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {"seed": 1})
    with pytest.raises(RunError, match=r"--resume.*--out"):
        RunDirectory.create(run.path, {"seed": 2})
    assert run.config == {"seed": 1}
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="exists already"):
        RunDirectory.create(tmp_path / "file", {})
    (tmp_path / "empty").mkdir()
    assert RunDirectory.create(tmp_path / "empty", {}).config == {}


def test_a_failed_set_up_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot make"):
        RunDirectory.create(tmp_path / "run", {"model": object()})
    assert not list(tmp_path.iterdir())


def test_other_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        RunDirectory.open(tmp_path)
    (tmp_path / "config.yaml").write_text("[1, 2")
    with pytest.raises(RunError, match="not YAML"):
        _ = RunDirectory.open(tmp_path).config


def test_log(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    assert run.metrics() == []
    assert run.metrics_size() == 0
    run.log({"step": 1, "loss": float("nan"), "nested": [float("inf"), {"x": 0.1}]})
    size = run.metrics_size()
    run.log({"step": 2})
    assert run.metrics() == [{"step": 1, "loss": None, "nested": [None, {"x": 0.1}]}, {"step": 2}]
    with run.metrics_path.open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    assert len(run.metrics()) == 2
    run.truncate_metrics(size)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1]
