"""The command line on a network whose channels leave layer norms."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fastprune.cli.main import main

NETWORK = "--model small_networks:between_norms --input 3x16x16"


def test_inspect_says_which_operators_mix_channels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"inspect {NETWORK} --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["exact"], found["inexact"], found["units"]) == (True, [], 12)
    assert main(shlex.split(f"inspect {NETWORK} --inexact --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["exact"], found["inexact"], found["units"]) == (False, ["layer_norm in 1"], 20)
    assert [group["exact"] for group in found["groups"]] == [False, True]
    assert main(shlex.split(f"inspect {NETWORK} --inexact")) == 0
    printed = capsys.readouterr().out
    assert "not exact for 8 units, whose channels are mixed by:\n  layer_norm in 1" in printed
    assert main(shlex.split(f"inspect {NETWORK}")) == 0
    assert "exact" not in capsys.readouterr().out


def test_prune_prints_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"prune {NETWORK} --method l1 --budget flops=0.3 --inexact"
    assert main(shlex.split(f"{line} --out {tmp_path / 'a'}")) == 0
    printed = capsys.readouterr().out
    assert "not exact: outputs differ by" in printed
    assert "layer_norm in 1" in printed
    assert main(shlex.split(f"{line} --out {tmp_path / 'b'} --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compact"]["macs"] <= 0.3 * found["baseline"]["macs"]
    assert found["inexact"]["operators"] == ["layer_norm in 1"]
    assert found["inexact"]["difference"] > 1e-4
    written = json.loads((tmp_path / "b" / "plan.json").read_text(encoding="utf-8"))
    assert (written["exact"], written["code"]) == (False, "own")
