"""The errors of modelled latencies: the networks that are compared, and the document."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from fastprune.cli.main import main

COMMAND = ["bench", "latency", "--model", "fastprune.testing.network:network", "--input", "3x16x16"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_modelled_and_measured_times_of_random_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    numbers = tmp_path / "numbers.json"
    assert main([*COMMAND, "--plans", "3", "--repeats", "2", "--batch", "2", "--json", str(numbers)]) == 0
    document = json.loads(numbers.read_text(encoding="utf-8"))
    assert [row["name"] for row in document["rows"]] == ["full network", "plan 1", "plan 2", "plan 3"]
    assert document["rows"][0]["macs"] == 1
    assert all(0 < row["macs"] < 1 for row in document["rows"][1:])
    for row in document["rows"]:
        assert row["error"] == pytest.approx(row["modelled_ms"] / row["measured_ms"] - 1)
        assert row["modelled_ms"] > 0
    assert document["median_error"] == statistics.median(abs(row["error"]) for row in document["rows"][1:])
    assert document["batch"] == 2
    assert document["clock"] == "wall time"
    assert any((own_cache / "latency").iterdir())
    printed = capsys.readouterr().out
    assert "plan 3" in printed
    assert f"median error of the plans: {100 * document['median_error']:.1f} %" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plans", "0"], "plans 0: must be at least 1"),
        (["--batch", "0"], "batch 0: must be at least 1"),
        (["--json", "/no/such/folder/x.json"], "there is no such folder"),
        (["--processor_time", "--device", "auto"], "processor_time: "),
    ],
)
def test_bad_settings_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err
