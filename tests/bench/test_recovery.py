"""The program that measures criteria and compensations, on an untrained network and few images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import recovery

from fastprune import models
from fastprune.methods.contract import Task
from fastprune.methods.gates.dmc import DMC


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *methods: str) -> None:
    line = f"recovery.py --model resnet20 --data synthetic:3x16x16:4:96 --json {path} --budgets 0.5 --images 32"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--compensate", "none", "bn", "--methods", *methods])
    recovery.main()


@pytest.mark.slow
def test_measurements_are_kept_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recovery.json"
    run(monkeypatch, path, "l1:ranking=global", "peer:taylor")
    first = json.loads(path.read_text())
    assert [(row["method"], row["how"]) for row in first["rows"]] == [
        ("l1:ranking=global", "none"), ("l1:ranking=global", "bn"), ("peer:taylor", "none"),
    ]  # fmt: skip
    assert all(0.4 < row["macs"] <= 0.5 for row in first["rows"])
    assert all(0 <= row["accuracy"] <= 1 for row in first["rows"])
    run(monkeypatch, path, "l1:ranking=global", "peer:taylor", "random")
    second = json.loads(path.read_text())
    assert second["rows"][:3] == first["rows"]
    assert [row["method"] for row in second["rows"][3:]] == ["random", "random"]
    lines = capsys.readouterr().out.splitlines()
    assert "| budget | method | MACs | raw | bn |" in lines
    assert [line.split("|")[2].strip() for line in lines[-3:]] == ["`l1:ranking=global`", "`peer:taylor`", "`random`"]
    assert lines[-2].split("|")[5].strip() == "–"  # torch-pruning's network is not compensated


@pytest.mark.slow
def test_a_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.safetensors"
    models.save_weights(models.create("resnet20"), weights)

    def search(folder: str) -> list[dict[str, Any]]:
        path = tmp_path / f"{folder}.json"
        line = f"recovery.py --model resnet20 --data synthetic:3x16x16:4:96 --json {path} --compensate none"
        line += f" --weights {weights} --budgets 0.5 --runs {tmp_path / folder}"
        line += " --methods dmc:epochs=3,batch_size=32,channels_last=true"
        monkeypatch.setattr(sys, "argv", line.split())
        recovery.main()
        return json.loads(path.read_text())["rows"]

    def fail_in_the_last_epoch(method: DMC, task: Task, epoch: int) -> dict[str, float]:
        if epoch == 2:
            raise OSError("no space left")
        return end_epoch(method, task, epoch)

    def note_epoch(method: DMC, task: Task, epoch: int) -> dict[str, float]:
        epochs.append(epoch)
        return end_epoch(method, task, epoch)

    end_epoch, epochs = DMC.end_epoch, []
    with monkeypatch.context() as patch:
        patch.setattr(DMC, "end_epoch", fail_in_the_last_epoch)
        with pytest.raises(OSError, match="no space"):
            search("parts")
    (whole,) = search("whole")
    monkeypatch.setattr(DMC, "end_epoch", note_epoch)
    (parts,) = search("parts")
    assert epochs == [2]
    assert whole.pop("seconds") > 0
    assert parts.pop("seconds") is None
    assert parts == whole


def test_means_and_ranges_over_seeds() -> None:
    assert recovery.describe([]) == "–"
    assert recovery.describe([90.0]) == "90.00"
    assert recovery.describe([90.0, 91.0, 90.5]) == "90.50 ± 0.5"
