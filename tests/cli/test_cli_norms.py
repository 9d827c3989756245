"""The command line on a network whose norms count removed channels as zeros."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from small_networks import between_norms

import fastprune as fp
from fastprune.cli.main import main
from fastprune.graph.norms import FullCount

NETWORK = "--model small_networks:between_norms --input 3x16x16"


def test_inspect_lists_the_norms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"inspect {NETWORK} --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["units"], found["norms"]) == (12, [])
    assert main(shlex.split(f"inspect {NETWORK} --replace_norms --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["units"], found["exact"], found["norms"]) == (20, True, ["1"])


def test_a_pruned_network_is_loaded_and_pruned_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"prune {NETWORK} --method l1 --budget flops=0.3 --replace_norms"
    assert main(shlex.split(f"{line} --dry_run --json")) == 0
    assert main(shlex.split(f"{line} --out {tmp_path / 'a'}")) == 0
    assert "not exact" not in capsys.readouterr().out
    written = json.loads((tmp_path / "a" / "plan.json").read_text(encoding="utf-8"))
    assert (written["exact"], written["code"], [norm["module"] for norm in written["norms"]]) == (True, "own", ["1"])
    assert "replace_norms: true" in (tmp_path / "a" / "config.yaml").read_text(encoding="utf-8")
    loaded = fp.load(tmp_path / "a")
    norm = loaded[1]
    assert isinstance(norm, FullCount)
    assert (norm.full_count, norm.normalized_shape) == (8, (loaded[0].out_channels,))
    further = f"prune --from_run {tmp_path / 'a'} --method l1 --budget flops=0.6 --replace_norms --out {tmp_path / 'b'}"
    assert main(shlex.split(further)) == 0
    again = fp.load(tmp_path / "b")
    assert again[1].full_count == 8
    assert again[0].out_channels < loaded[0].out_channels
    assert again(torch.zeros(1, 3, 16, 16)).shape == (1, 4)


def test_heads_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = "--model timm:vit_tiny_patch16_224 --input 3x224x224"
    units = {}
    for options in ("", "--heads", "--heads --replace_norms"):
        assert main(shlex.split(f"inspect {network} {options} --json")) == 0
        units[options] = json.loads(capsys.readouterr().out)["units"]
    assert units == {"": 12 * 768, "--heads": 12 * (768 + 3), "--heads --replace_norms": 12 * (768 + 3) + 192}


def test_pruning_in_steps_and_resuming(tmp_path: Path) -> None:
    network, image = between_norms(), torch.zeros(1, 3, 16, 16)
    result = fp.prune(network, image, method="l1", budget="flops=0.4", replace_norms=True, out=tmp_path / "run")
    assert result.metrics["difference"] < 1e-5
    with pytest.raises(ValueError, match="begun with replace_norms True, not False"):
        fp.prune(network, image, method="l1", budget="flops=0.4", out=tmp_path / "run", resume=True)
