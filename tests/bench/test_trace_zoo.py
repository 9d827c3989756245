"""Times of tracing and surgery, and of the peer if it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trace_zoo import STEPS, Settings, geometric_means, line, main, time_networks


@pytest.mark.slow
def test_a_network_is_timed_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    main(["--only", "timm:lcnet_050", "--rounds", "1", "--json", str(numbers)])
    row = json.loads(numbers.read_text(encoding="utf-8"))["networks"][0]
    seconds = row["seconds"]
    assert all(seconds[step] > 0 for step in STEPS)
    assert seconds["total"] == pytest.approx(sum(seconds[step] for step in STEPS))
    assert "timm:lcnet_050: trace" in capsys.readouterr().out


def test_means_leave_out_networks_on_which_the_peer_fails() -> None:
    rows = [{"ratios": {"in total": 2.0}}, {"peer_error": "x"}, {"ratios": {"in total": 8.0}}]
    assert geometric_means(rows) == {"in total": pytest.approx(4.0)}
    assert geometric_means([{}]) == {}
    failed = {"name": "a", "seconds": {"total": 1.0}, "peer_error": "ValueError"}
    assert line(failed) == "a: total 1.00 s; torch-pruning failed: ValueError"


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds 0: must be at least 1"):
        Settings(rounds=0)
    with pytest.raises(ValueError, match="matches no network of the list"):
        time_networks(Settings(only=("timm:nothing*",)))
