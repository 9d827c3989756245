"""Top-5 beside top-1: where there are 10 classes or more, in evaluations, logs and on the command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.cli.main import main
from fastprune.data import load_data
from fastprune.engine import TrainConfig, evaluate, train
from fastprune.training.objective import Objective

SCORES = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 12


def top5_by_hand(scores: torch.Tensor, labels: torch.Tensor) -> float:
    better = (scores > scores.gather(1, labels[:, None])).sum(1)
    return (better < 5).double().mean().item()


class Fixed(nn.Module):
    """Scores that depend on the image's sum alone, so that they can be computed again."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(48, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("classes", [9, 10, 12])
def test_an_evaluation_over_uneven_batches(classes: int) -> None:
    torch.manual_seed(0)
    net, data = Fixed(classes), load_data(f"synthetic:3x4x4:{classes}:200")
    result = evaluate(net, data, batch_size=17)
    images, labels = next(iter(data.batches("test", 50, complete=True)))
    assert ("top5" in result) == (classes >= 10)
    if classes >= 10:
        assert result["top5"] == top5_by_hand(net(images), labels)
        assert result["accuracy"] <= result["top5"]


def test_the_metrics_of_a_step() -> None:
    _, metrics = Objective().measure(SCORES, LABELS)
    assert metrics["top5"].item() == pytest.approx(top5_by_hand(SCORES, LABELS))
    soft = nn.functional.one_hot(LABELS, 12).float()
    assert Objective().measure(SCORES, soft, soft=True)[1]["top5"] == metrics["top5"]
    assert "top5" not in Objective().measure(SCORES[:, :9], LABELS % 9)[1]
    assert Objective(loss=nn.MSELoss()).measure(SCORES, SCORES)[1] == {}
    pixels = torch.randn(2, 12, 3, 3)
    assert set(Objective().measure(pixels, torch.zeros(2, 3, 3, dtype=torch.long))[1]) == {"accuracy"}


def test_pixels_have_none() -> None:
    batches = [(torch.randn(2, 12, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long))]
    assert set(fp.evaluate(nn.Conv2d(12, 12, 1), batches)) == {"accuracy", "loss", "samples"}


def test_a_training_logs_it() -> None:
    metrics = train(Fixed(12), load_data("synthetic:3x4x4:12:96"), TrainConfig(epochs=1, batch_size=32), device="cpu")
    assert {"top5", "held_out_top5"} <= metrics.keys()
    few = train(Fixed(4), load_data("synthetic:3x4x4:4:96"), TrainConfig(epochs=1, batch_size=32), device="cpu")
    assert not any("top5" in name for name in few)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "prune --model resnet20 --method l1 --compensate none --data synthetic:3x8x8:12:64 --device cpu"
    assert main(shlex.split(f"{line} --out {tmp_path}/run --json")) == 0
    pruned = json.loads(capsys.readouterr().out)
    assert main(shlex.split(f"evaluate --run {tmp_path}/run --device cpu --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compact"]["top5"] == pruned["compact"]["top5"] >= found["compact"]["accuracy"]
    assert fp.compare([tmp_path / "run"]).rows[0]["top5"] == found["compact"]["top5"]
    assert main(shlex.split(f"evaluate --run {tmp_path}/run --device cpu")) == 0
    assert "top-5" in capsys.readouterr().out
