"""The experiment on proxies, on synthetic images and with as little training as possible."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import proxies
import pytest


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> None:
    line = (
        f"proxies.py --data synthetic:3x16x16:4:96 --json {path} --networks 2 --seeds 2 --epochs 1 --images 64 "
        "--supernet_epochs 1 --batch_size 32 --supernet_batch_size 32"
    )
    monkeypatch.setattr(sys, "argv", [*line.split(), *more])
    proxies.main()


@pytest.mark.slow
def test_numbers_are_kept_and_shared_among_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "proxies.json"
    run(monkeypatch, path, "--share", "1/2")
    first = json.loads(path.read_text())
    assert list(first["supernets"]) == ["sp"]
    assert [len(row["accuracies"]) for row in first["networks"]] == [2, 0, 2, 0]
    for row in first["networks"]:
        goal = float(row["budget"].partition("=")[2])
        assert goal - 0.02 <= row["ratio"] <= goal
    run(monkeypatch, path, "--share", "2/2")
    second = json.loads(path.read_text())
    assert set(second["supernets"]) == {"sp", "autoslim"}
    assert all(len(row["accuracies"]) == 2 for row in second["networks"])
    assert second["networks"][0]["accuracies"] == first["networks"][0]["accuracies"]
    names = {"mse", "channel", "fisher", "network", "autoslim", "autoslim_error", "mse_relative"}
    assert all(names <= row["proxies"].keys() for row in second["networks"])
    capsys.readouterr()
    monkeypatch.setattr(proxies, "train", lambda *_, **__: pytest.fail("nothing is left to do"))
    monkeypatch.setattr(proxies, "run_phases", lambda *_, **__: pytest.fail("nothing is left to do"))
    run(monkeypatch, path)
    assert json.loads(path.read_text()) == second
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| ρ with the accuracy from scratch | flops=0.5 | flops=0.35 | all |"
    assert any(line.startswith("| fisher | – | – | ") for line in lines)
    with pytest.raises(ValueError, match="has settings"):
        run(monkeypatch, path, "--images", "32")


def make_row(loss: float, *accuracies: float) -> dict[str, Any]:
    scratch = {str(seed): accuracy for seed, accuracy in enumerate(accuracies)}
    return {"proxies": {"mse": [loss / 2, loss / 2]}, "ratio": 0.5, "accuracies": scratch}


def test_correlations() -> None:
    rows = [make_row(3.0, 0.7, 0.71), make_row(2.0, 0.8, 0.79), make_row(1.0, 0.9, 0.78), make_row(0.0, 0.1)]
    found = proxies.correlate(rows)  # the last one lacks a seed
    assert found == {"mse": pytest.approx(1.0), "cost": 0.0, "seeds": pytest.approx(0.5)}
    assert proxies.correlate(rows[:2]) == {}
