"""Transfer: a trained or a pruned network gets a new classifier and is trained on other data."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import fastprune as fp
from fastprune import models
from fastprune.cli.main import main

FIRST, OTHER = "synthetic:3x8x8:10:64", "synthetic:3x8x8:7:64"
SHORT = "--epochs 1 --batch_size 32 --lr 1e-9 --device cpu"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    models.save_weights(models.create("resnet20"), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def bodies_agree(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.allclose(x, y, atol=1e-6)
        for (name, x), (_, y) in zip(one.named_parameters(), other.named_parameters(), strict=True)
        if not name.startswith("fc.")
    )


def test_training(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train --model resnet20 --weights {weights} --data {OTHER} {SHORT} --out {tmp_path}/run"
    assert main(shlex.split(line)) == 2
    assert "of another shape: fc.weight" in capsys.readouterr().err
    assert main(shlex.split(f"{line} --num_classes 6")) == 2
    assert "7 classes, the network tells 6 apart" in capsys.readouterr().err
    assert main(shlex.split(f"{line} --num_classes 7")) == 0
    network = fp.load(tmp_path / "run")
    assert network.fc.out_features == 7
    assert bodies_agree(models.create("resnet20", weights=weights), network)
    assert main(shlex.split(f"train --resume --out {tmp_path}/run")) == 0
    assert main(shlex.split(f"evaluate --run {tmp_path}/run --device cpu")) == 0


def test_as_many_classes_are_no_reason_to_keep_the_old_one(weights: Path, tmp_path: Path) -> None:
    line = f"train --model resnet20 --weights {weights} --data {FIRST} {SHORT} --out {tmp_path}"
    assert main(shlex.split(f"{line}/kept")) == 0
    assert main(shlex.split(f"{line}/new --num_classes 10 --seed 1")) == 0
    old = models.create("resnet20", weights=weights).fc.weight
    kept, new = (fp.load(tmp_path / name).fc.weight for name in ("kept", "new"))
    assert torch.allclose(kept, old, atol=1e-6)
    assert not torch.allclose(new, old, atol=1e-2)


def test_a_pruned_network(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    line = f"prune --model resnet20 --weights {weights} --data {FIRST} --method l1 --budget flops=0.5 --device cpu"
    assert main(shlex.split(f"{line} --out {run}")) == 0
    pruned = fp.load(run)
    tune = f"finetune --run {run} --data {OTHER} {SHORT}"
    capsys.readouterr()
    assert main(shlex.split(tune)) == 2
    assert "give data of the same classes" in capsys.readouterr().err

    new = fp.load(run, num_classes=7)
    assert new.fc.weight.shape == (7, pruned.fc.in_features)
    assert bodies_agree(pruned, new)
    with pytest.raises(ValueError, match="only the pruned network"):
        fp.load(run, "baseline", num_classes=7)

    assert main(shlex.split(f"{tune} --num_classes 7 --teacher auto")) == 2
    assert main(shlex.split(f"{tune} --num_classes 7 --seed 3")) == 0
    network = fp.load(run)
    assert network.fc.weight.shape == new.fc.weight.shape
    assert bodies_agree(pruned, network)
    assert yaml.safe_load((run / "finetune.yaml").read_text())["num_classes"] == 7
    assert main(shlex.split(f"finetune --resume --run {run}")) == 0
    capsys.readouterr()
    assert main(shlex.split(f"evaluate --run {run} --data {OTHER} --device cpu --json")) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"compact"}


def test_a_network_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Own(models.ResNet):
        pass

    fp.prune(Own(20), torch.zeros(1, 3, 8, 8), method="l1", data=FIRST, compensate="none", out=tmp_path / "run")
    assert main(shlex.split(f"finetune --run {tmp_path}/run --model resnet20 --num_classes 7 --data {OTHER}")) == 2
    assert "nothing says what builds the network" in capsys.readouterr().err
