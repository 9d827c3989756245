"""The command line on a network whose code cannot run on fewer channels."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fastprune.cli.main import main

NETWORK = "--model torchvision:shufflenet_v2_x0_5 --data synthetic:3x64x64:4:32"


def run(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, float]]:
    assert main([*shlex.split(line), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_prune_evaluate_and_finetune_a_rewritten_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    pruned = run(f"prune {NETWORK} --method l1 --budget flops=0.4 --out {out}", capsys)
    assert json.loads((out / "plan.json").read_text(encoding="utf-8"))["code"] == "rewritten"
    assert pruned["compact"]["macs"] <= 0.4 * pruned["baseline"]["macs"]
    before = run(f"evaluate --run {out}", capsys)
    assert before["compact"]["macs"] == pruned["compact"]["macs"]
    assert before["compact"]["accuracy"] == pruned["compact"]["accuracy"]
    tuned = run(f"finetune --run {out} --epochs 1 --batch_size 16", capsys)
    found = run(f"evaluate --run {out}", capsys)
    assert found["compact"]["macs"] == pruned["compact"]["macs"]
    assert found["compact"]["accuracy"] == tuned["compact"]["accuracy"]


@pytest.mark.slow
def test_a_network_can_keep_its_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    run(f"prune {NETWORK} --method l1 --budget flops=0.8 --keep_class --out {out}", capsys)
    assert json.loads((out / "plan.json").read_text(encoding="utf-8"))["code"] == "own"
    units = [
        run(f"inspect --model torchvision:shufflenet_v2_x0_5 --input 3x64x64 {flag}", capsys)["units"]
        for flag in ("", "--keep_class")
    ]
    assert units[0] > units[1] > 0
