"""The experiment on proxies, on digits and for as little training as possible."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastprune.models import create

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_proxies_and_accuracies_of_each_network(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights, file = tmp_path / "model.safetensors", tmp_path / "ranking.json"
    torch.manual_seed(0)
    save_file(create("resnet20", num_classes=10, in_channels=1).state_dict(), weights)
    few = "--networks 3 --supernet_epochs 1 --scratch_epochs 1 --scratch_seeds 2 --images 64"
    fast = "--precision bf16 --channels_last"
    command = f"{ROOT}/bench/ranking.py --data digits --weights {weights} --json {file} {few} {fast}"
    subprocess.run([sys.executable, *command.split()], check=True, capture_output=True)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["training"]["precision"] == "bf16"
    assert found["training"]["channels_last"] is True
    assert len(found["networks"]) == 3
    for network in found["networks"]:
        assert 0.48 <= network["flops_ratio"] <= 0.5
        assert len(network["from_scratch"]) == 2
        assert all(0 < accuracy < 1 for accuracy in network["from_scratch"])
        assert network["sp_loss"] > 0
    assert len({network["sp_loss"] for network in found["networks"]}) == 3
    assert set(found["spearman"]) == {"sp", "sp_relative", "autoslim", "autoslim_loss", "seeds"}
    # Not a number where three networks are all the same to a proxy.
    assert all(math.isnan(of["rho"]) or -1 <= of["rho"] <= 1 for of in found["spearman"].values())
