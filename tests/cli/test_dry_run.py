"""``prune --dry-run``: the truth about a pruning that is not done."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fastprune.cli.main import main

LINE = "prune --model resnet20 --data synthetic:3x8x8:4:128 --device cpu --dry_run"


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def preview(options: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(shlex.split(f"{LINE} {options} --json")) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_an_equal_ratio_is_what_uniform_prunes(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = preview("--method uniform --budget flops=0.5", capsys)
    assert list(empty.iterdir()) == []
    real = LINE.replace("--dry_run", "--out run --json")
    assert main(shlex.split(f"{real} --method uniform --budget flops=0.5")) == 0
    done = json.loads(capsys.readouterr().out)
    assert found["planned"] == done["compact"]["macs"]
    assert found["full"] == done["baseline"]["macs"]
    assert found["seconds"] is None
    assert str(found["how"]).startswith("none: the method does not search")


def test_time_is_estimated_from_steps(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = preview("--dmc.epochs 10 --dmc.batch_size 16 --dmc.samples 64", capsys)
    assert "40 steps of " in str(one["how"])
    assert 0 < float(str(one["seconds"])) < 600
    assert list(empty.iterdir()) == []
    groups = one["groups"]
    assert isinstance(groups, list)
    assert groups[0] == {"group": "conv1", "units": 16, "prunable": 0, "kept": 16, "least": 16}


def test_time_that_nobody_knows_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    found = preview("--method sp --sp.adaptor trained --sp.batch_size 16", capsys)
    assert found["seconds"] is None
    assert "unknown: the number of rounds in 'search'" in str(found["how"])


def test_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(shlex.split(f"{LINE} --dmc.batch_size 16")) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert "then: compensation on 512 images" in out
    assert main(shlex.split(f"{LINE} --dmc.batch_size 16 --compensate none")) == 0
    assert "compensation" not in capsys.readouterr().out
    assert "dmc leaves 1 of 10 groups alone: conv1" in " ".join(out.split())


def test_a_budget_out_of_reach_says_what_limits_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"{LINE} --method l1 --budget flops=0.001")) == 2
    assert "most of it in" in capsys.readouterr().err
