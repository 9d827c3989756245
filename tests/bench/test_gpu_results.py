"""The script that runs the papers' rows on a GPU, tried out on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastprune import models

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_results.sh"
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


def call(runs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    values = {**os.environ, "SMOKE": "1", "PATH": path, **environment}
    return subprocess.run([str(BASH), str(SCRIPT), str(runs)], env=values, text=True, capture_output=True, check=False)


def test_it_reads_well() -> None:
    subprocess.run([str(BASH), "-n", str(SCRIPT)], check=True)


@pytest.mark.slow
def test_rows_are_run_noted_and_not_run_again(tmp_path: Path) -> None:
    models.save_weights(models.create("resnet56"), tmp_path / "w.safetensors")
    row = {"ROWS": "l1-resnet56-cifar10", "BASE_resnet56": str(tmp_path / "w.safetensors")}
    first = call(tmp_path / "runs", **row)
    assert first.returncode == 0, first.stderr
    results = tmp_path / "runs" / "results.jsonl"
    (line,) = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    assert (line["recipe"], line["seed"], line["epochs_of_finetuning"], line["machine"]) == (row["ROWS"], 0, 1, "cpu")
    assert line["paper"]["pruned_top1"] == 93.06
    assert line["measured"]["compact"]["accuracy"] == pytest.approx(line["outcome"]["accuracy_tuned"])
    assert line["outcome"]["macs"] / line["outcome"]["macs_full"] <= 0.724
    assert "done before" in call(tmp_path / "runs", **row).stdout
    # Without its line a row goes on from its files, and ends with the same numbers.
    results.unlink()
    again = call(tmp_path / "runs", **row)
    assert again.returncode == 0, again.stderr
    (second,) = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    assert second["measured"] == line["measured"]


@pytest.mark.slow
def test_a_row_that_fails_is_counted(tmp_path: Path) -> None:
    row = {"ROWS": "l1-resnet56-cifar10", "BASE_resnet56": str(tmp_path / "nowhere.safetensors")}
    found = call(tmp_path / "runs", **row)
    assert found.returncode == 1
    assert "there is no such file" in found.stderr
    assert "l1-resnet56-cifar10, seed 0: FAILED" in found.stdout
