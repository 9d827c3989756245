"""The experiment on proxies, on digits and with as little training as possible."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranking
import torch

from fastprune.engine import Placement
from fastprune.engine.device import cpu_computes_bf16
from fastprune.engine.training import TrainConfig
from fastprune.methods.sp.sp import SP
from fastprune.models import create
from fastprune.testing import network as small_network
from fastprune.testing import sample_data

ROOT = Path(__file__).parents[2]


def draw_masks(seed: int) -> tuple[list[torch.Tensor], Any]:
    method, task = ranking.prepare(SP, small_network(), sample_data(), Placement(), "flops=0.5", 1, 32)
    return ranking.draw(method, task, 5, seed), task


@pytest.mark.slow
def test_networks_are_drawn_within_the_budget() -> None:
    masks, task = draw_masks(seed=3)
    full = float(task.budget.cost(task.graph))
    assert all(0.48 * full <= float(task.budget.cost(task.graph, mask)) <= 0.5 * full for mask in masks)
    again, other = draw_masks(seed=3)[0], draw_masks(seed=4)[0]
    assert all(torch.equal(*pair) for pair in zip(masks, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(masks, other, strict=True))


@pytest.mark.slow
def test_stored_accuracies_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, task = draw_masks(seed=3)
    trained: list[int] = []
    monkeypatch.setattr(ranking, "create", lambda *_, **__: small_network())
    monkeypatch.setattr(ranking, "train", lambda *_, seed, **__: trained.append(seed))
    monkeypatch.setattr(ranking, "evaluate", lambda *_: {"accuracy": len(trained) / 10})
    file = tmp_path / "scratch.json"
    settings = {"model": "small", "training": {**vars(TrainConfig()), "epochs": 2}}
    known = ranking.FromScratch(file, settings)
    found = [known.accuracy(task, mask, sample_data(), seed) for seed in (0, 1) for mask in masks[:2]]
    assert found == [0.1, 0.2, 0.3, 0.4]
    known = ranking.FromScratch(file, settings)
    assert [known.accuracy(task, mask, sample_data(), seed) for seed in (0, 1) for mask in masks[:2]] == found
    assert trained == [0, 0, 1, 1]
    assert known.accuracy(task, masks[2], sample_data(), 0) == 0.5
    with pytest.raises(ValueError, match="this run has"):
        ranking.FromScratch(file, {**settings, "model": "large"})
    with pytest.raises(ValueError, match="there is no folder"):
        ranking.FromScratch(tmp_path / "nowhere" / "scratch.json", settings)


@pytest.mark.slow
def test_every_network_has_its_proxies_and_accuracies(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights, file = tmp_path / "model.safetensors", tmp_path / "ranking.json"
    torch.manual_seed(0)
    save_file(create("resnet20", num_classes=10, in_channels=1).state_dict(), weights)
    few = "--networks 3 --supernet_epochs 1 --scratch_epochs 1 --scratch_seeds 2 --images 64"
    precision = "bf16" if cpu_computes_bf16() else "float32"  # elsewhere it takes minutes
    fast = f"--precision {precision} --channels_last"
    command = f"{ROOT}/bench/ranking.py --data digits --weights {weights} --json {file} {few} {fast}"
    subprocess.run([sys.executable, *command.split()], check=True, capture_output=True)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["training"]["precision"] == precision
    assert found["training"]["channels_last"] is True
    assert len(found["networks"]) == 3
    for network in found["networks"]:
        assert 0.48 <= network["flops_ratio"] <= 0.5
        assert len(network["from_scratch"]) == 2
        assert all(0 < accuracy < 1 for accuracy in network["from_scratch"])
        assert network["sp_loss"] == pytest.approx(sum(network["sp_losses"]))
        assert all(loss > 0 for loss in network["sp_losses"])
        assert network["sp_relative"] > 0
        assert len(network["widths"]) == 10
    assert len({network["sp_loss"] for network in found["networks"]}) == 3
    assert set(found["spearman"]) == {"sp", "sp_relative", "autoslim", "autoslim_loss", "seeds"}
    # Not a number if a proxy gives all three networks the same value.
    assert all(math.isnan(r["rho"]) or -1 <= r["rho"] <= 1 for r in found["spearman"].values())
