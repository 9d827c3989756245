"""The table of networks: networks that are pruned, networks that are not, and failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from prune_zoo import Settings, coverage, macs, main, markdown, outcome, prune_by_half, run_process, summary


def test_the_list_has_all_convolutional_networks_of_torchvision_and_each_name_once() -> None:
    names = zoo.names()
    assert sum(name.startswith("torchvision:") for name in names) == 68
    assert sum(name.startswith("timm:") for name in names) > 150
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_network_is_pruned_by_half_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, numbers = tmp_path / "table.md", tmp_path / "numbers.json"
    arguments = ["--only", "timm:lcnet_050", "--markdown", str(table), "--json", str(numbers)]
    main(arguments)
    ours = json.loads(numbers.read_text(encoding="utf-8"))["networks"][0]["ours"]
    assert ours["difference"] < 1e-12
    assert ours["cost_is_counted"]
    assert 0.25 < ours["macs_left"] < 0.4
    assert not ours["rewritten"]
    assert "timm: of 1 networks 1 pruned exactly" in capsys.readouterr().out
    assert "| timm:lcnet_050 | 17 |" in table.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rewritten"),
    [("torchvision:shufflenet_v2_x0_5", True), ("timm:mixnet_s", False), ("timm:res2net50_14w_8s", False)],
)
def test_channels_that_are_cut_and_shuffled_are_pruned(name: str, rewritten: bool) -> None:
    ours = prune_by_half(name)
    assert ours["difference"] < 1e-12
    assert ours["cost_is_counted"]
    assert ours["kept"] == 1
    assert ours["rewritten"] == rewritten


@pytest.mark.slow
def test_channels_leave_norms_exactly(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    document = coverage(Settings(only=("timm:convnext_atto",), attention=True, markdown=str(table)))
    ours = document["networks"][0]["ours"]
    assert ours["difference"] < 1e-12
    assert ours["cost_is_counted"]
    assert ours["prunable"] > 0.99
    assert "prune_zoo.py --workers 1 --attention --only 'timm:convnext_atto'" in table.read_text(encoding="utf-8")


@pytest.mark.slow
def test_channels_that_norms_mix_are_pruned_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, numbers = tmp_path / "table.md", tmp_path / "numbers.json"
    arguments = ["--only", "timm:convnextv2_atto", "--inexact", "--markdown", str(table), "--json", str(numbers)]
    main(arguments)
    ours = json.loads(numbers.read_text(encoding="utf-8"))["networks"][0]["ours"]
    assert 1e-3 < ours["difference"] < 1
    assert ours["cost_is_counted"]
    assert ours["macs_left"] < 0.27
    assert ours["prunable"] > 0.97
    assert len(ours["inexact"]) == 29
    assert "timm: of 1 networks 1 pruned inexactly" in capsys.readouterr().out
    command = "prune_zoo.py --workers 1 --inexact --only 'timm:convnextv2_atto' --markdown docs/coverage-inexact.md"
    assert command in table.read_text(encoding="utf-8")


@pytest.mark.slow
def test_failures_are_rows_of_the_table() -> None:
    failed = run_process("ours", "timm:no_such_network", 100)
    assert failed == {"error": failed["error"]}
    assert "no_such_network" in failed["error"]
    assert run_process("ours", "timm:lcnet_050", 0.01) == {"error": "not done after 0.01 s"}
    nothing = {
        "groups": 0, "units": 0, "macs": 1, "macs_left": 1.0, "layers": 2, "kept": 2, "reasons": {"mul": 2},
        "seconds": 1.0, "prunable": 0.0, "inexact": [],
    }  # fmt: skip
    wrong = nothing | {"groups": 1, "difference": 1e-3, "cost_is_counted": True, "rewritten": True}
    rows = [{"name": f"timm:{n}", "ours": ours} for n, ours in (("a", failed), ("b", nothing), ("c", wrong))]
    document = {"machine": "m", "threads": 1, "workers": 1, "inexact": False, "torch": "t", "networks": rows}
    assert summary(document) == "timm: of 3 networks 1 failed, 1 without a prunable channel, 1 wrong"
    assert "| timm:a |  |  |  |  |  |  |  | failed: ValueError: model 'timm:no_such_network'" in markdown(document)
    assert "| timm:b | 0 | 0 | 2 of 2: mul | 1.00 | 0.0 % | 1.0 |  |  |" in markdown(document)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="matches no network of the list"):
        coverage(Settings(only=("timm:nothing*",)))
    with pytest.raises(ValueError, match="both must be above 0"):
        Settings(workers=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed:mixer_s32_224", "mixed:pit_ti_224", "mixed:mobilevit_s"])
def test_networks_of_attention_are_pruned_exactly(name: str) -> None:
    result = prune_by_half(name)
    assert result["groups"] > 10
    assert outcome(result) == "pruned exactly"


def test_counting_leaves_the_model_alone() -> None:
    """The peer silently prunes nothing in a frozen model."""
    model, size = zoo.create("timm:lcnet_050")
    assert macs(model, size) > 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_run_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run keeps rows without a failure, makes the others again, and refuses a file of another torch."""
    nothing = {
        "groups": 0, "units": 0, "macs": 1, "macs_left": 1.0, "layers": 2, "kept": 2, "reasons": {"mul": 2},
        "seconds": 1.0, "prunable": 0.0, "inexact": [],
    }  # fmt: skip
    asked = []

    def stand_in(who: str, name: str, limit: float) -> dict[str, Any]:
        asked.append(name)
        return nothing if limit > 1 or name == "timm:lcnet_050" else {"error": "not done after 1 s"}

    monkeypatch.setattr("prune_zoo.run_process", stand_in)
    file = tmp_path / "numbers.json"
    settings = {"only": ("timm:lcnet_050", "timm:mixnet_s"), "json": str(file), "resume": True}
    coverage(Settings(**settings, limit=1.0))
    again = coverage(Settings(**settings, limit=100.0))
    assert asked[2:] == ["timm:mixnet_s"]
    assert [row["ours"] for row in again["networks"]] == [nothing, nothing]
    assert json.loads(file.read_text(encoding="utf-8")) == again
    file.write_text(json.dumps(again | {"torch": "1.0"}))
    with pytest.raises(ValueError, match=r"numbers.json' has torch '1.0', this run '2"):
        coverage(Settings(**settings))
    with pytest.raises(ValueError, match="needs --json"):
        Settings(resume=True)
