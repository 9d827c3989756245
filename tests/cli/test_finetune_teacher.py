"""``fastprune finetune`` with a teacher and a moving average."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import fastprune as fp
from fastprune.cli.main import main
from fastprune.engine import evaluate
from fastprune.training.weight_training import WeightTraining

CODE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Residual(nn.Module):
    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.outer = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.outer(self.inner(x))).relu().mean((2, 3)))

def teacher(num_classes=4):
    torch.manual_seed(5)
    return Residual(num_classes)

def ten():
    return Residual(10)

def loaders():
    torch.manual_seed(0)
    images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    parts = TensorDataset(images[:48], labels[:48]), TensorDataset(images[48:], labels[48:])
    return tuple(DataLoader(part, batch_size=16) for part in parts)
"""

PRUNE = "prune own.py:Residual --data own.py:loaders --method l1 --ignore stem outer --budget 0.6"
TUNE = "finetune --epochs 2 --batch-size 16"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


@pytest.fixture
def pruned(here: Path) -> Path:
    """A run of a trained network."""
    torch.manual_seed(1)
    fp.models.save_weights(fp.models.create("own.py:teacher"), here / "w.safetensors")
    assert run(f"{PRUNE} --weights w.safetensors --out a") == 0
    return here / "a"


def run(line: str) -> int:
    return main(shlex.split(line))


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("stage") == "finetune"]


def test_the_own_network_teaches_and_the_average_is_kept(
    pruned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pruned, "b")
    assert run(f"{TUNE} --run a --teacher auto --distill-features 0.5 --ema 0.9 --label-smoothing 0.1 --json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = log_of(pruned)[-1]
    assert last["distillation"] > 0
    assert last["features"] > 0
    network = fp.load("a")
    found = evaluate(network, fp.data.load_data("own.py:loaders"), "held_out")
    assert result["compact"]["held_out_accuracy"] == found["accuracy"] == last["held_out_accuracy"]
    # Killed in the third of six steps and resumed: the same weights; the recipe on disk names the teacher.
    update, count = WeightTraining.update, 0

    def stop(self: WeightTraining) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        update(self)

    monkeypatch.setattr(WeightTraining, "update", stop)
    options = "--teacher auto --distill-features 0.5 --ema 0.9 --label-smoothing 0.1"
    assert run(f"{TUNE} --run b {options}") == 130
    monkeypatch.setattr(WeightTraining, "update", update)
    begun = yaml.safe_load(Path("b", "finetune.yaml").read_text())
    assert (begun["teacher"], begun["ema"], begun["distill_features"]) == ("auto", 0.9, 0.5)
    assert run("finetune --run b --resume") == 0
    again = fp.load("b").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())
    assert log_of(Path("b").absolute())[-1] == last


def test_features_of_a_pruned_residual_stream(here: Path) -> None:
    """The plan says which of the teacher's channels the network has: at the start they are the same."""
    model = fp.models.create("own.py:teacher")
    result = fp.prune(model, torch.zeros(1, 3, 8, 8), method="l1", budget=0.6, out="m")
    assert result.plan.layers["stem"][0] < 8
    data = fp.data.load_data("own.py:loaders")
    options = {"batch_size": 16, "lr": 0.0, "distill_features": 1.0}
    metrics = fp.finetune(result, data, teacher=model, epochs=1, **options)
    images = torch.cat([x for x, _ in data.batches("train", 16)])
    outputs: dict[str, torch.Tensor] = {}
    for network in (model, result.model.train()):
        network.outer.register_forward_hook(lambda _m, _i, output: outputs.__setitem__("outer", output.detach()))
    model.eval()(images)
    wanted = outputs["outer"][
        :,
        result.plan.kept_indices(next(s for s in result.plan.slices if s.tensor == "outer.weight" and s.role == "out")),
    ]
    errors = []
    for own, other in zip(images.split(16), wanted.split(16), strict=True):
        result.model(own)
        errors.append(float((outputs["outer"] - other).square().sum() / other.square().sum()))
    assert metrics["features"] == pytest.approx(sum(errors) / 3, rel=0.05)  # batches are in another order


def test_a_recipe_in_the_run_names_the_teacher(pruned: Path) -> None:
    config = yaml.safe_load((pruned / "config.yaml").read_text())
    recipe = {"teacher": "auto", "distill": 0.25, "ema": 0.5, "epochs": 1}
    (pruned / "config.yaml").write_text(yaml.safe_dump({**config, "finetune": recipe}))
    assert run("finetune --run a --batch-size 16") == 0
    assert log_of(pruned)[-1]["distillation"] > 0
    assert run("finetune --run a --batch-size 16 --teacher none") == 0
    assert "distillation" not in log_of(pruned)[-1]


def test_other_teachers(pruned: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("train own.py:Residual --data own.py:loaders --epochs 1 --batch_size 16 --out base") == 0
    (here / "elsewhere").mkdir()
    values = []
    for teacher, place in (("base", "base"), ("own.py:teacher", "own.py:teacher")):
        monkeypatch.chdir(here)
        assert run(f"{TUNE} --run a --teacher {teacher}") == 0
        assert yaml.safe_load((pruned / "finetune.yaml").read_text())["teacher"] == str(here / place)
        monkeypatch.chdir(here / "elsewhere")
        assert run(f"finetune --run {pruned} --resume") == 0
        values.append(log_of(pruned)[-1]["distillation"])
    assert values[0] != values[1]


def test_what_cannot_teach_is_refused(pruned: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune resnet20 --data own.py:loaders --method l1 --out random") == 0
    torch.manual_seed(0)
    memory = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fp.prune(memory, torch.zeros(1, 3, 8, 8), method="l1", out="memory")
    for line, message in {
        "--run a --teacher memory": r"cannot be built by a name; in Python give .*fp.load\(.*memory', model=net\)",
        "--run random --teacher auto": "had random weights, which teach nothing; give --teacher RUN",
        "--run a --teacher random": "its network has random weights",
        "--run a --teacher own.py:ten": r"scores are of shape \[2, 10\], the network's of \[2, 4\]",
        "--run a --teacher resnet20": "neither a run nor a network with weights; give --teacher RUN",
        "--run a --teacher elsewhere": "neither a run nor",
        "--run a --teacher torchvision:resnet1": "--teacher torchvision:resnet1: .*; give --teacher RUN",
        "--run a --teacher own.py": "this is no run, it has no config.yaml",
        "--run a --distill 0.9": "--distill: there is no teacher; give --teacher auto, or leave --distill out",
        "--run a --teacher none --temperature 2": "--temperature: there is no teacher",
        "--run a --teacher auto --distill 1.5": "must be at least 0 and at most 1",
        "--run a --ema 1": "must be at least 0 and below 1",
    }.items():
        capsys.readouterr()
        assert run(f"{TUNE} {line}") == 2, line
        error = capsys.readouterr().err
        assert re.search(message, error), error
    for name in ("a", "random"):
        assert not (here / name / "finetune.yaml").exists()
    (pruned / "baseline.safetensors").unlink()
    assert run(f"{TUNE} --run a --teacher auto") == 2
    assert re.search("--teacher auto: .* keeps no weights of its baseline.*give --teacher RUN", capsys.readouterr().err)


def test_a_network_in_memory_is_taught_by_itself(here: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = fp.models.create("own.py:teacher")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    model = Own()
    data = fp.data.load_data("own.py:loaders")
    result = fp.prune(model, torch.zeros(1, 3, 8, 8), method="l1", ignore=["net.stem", "net.outer"], out="m")
    baseline = fp.load("m", "baseline", model=Own())
    metrics = fp.finetune(result, data, teacher=model, distill_features=1.0, epochs=1, ema=0.9, batch_size=16)
    assert {"distillation", "features", "held_out_loss"} <= set(metrics)
    assert all(
        torch.equal(x, y) for x, y in zip(model.state_dict().values(), baseline.state_dict().values(), strict=True)
    )


def test_the_python_interface_refuses_what_cannot_teach(pruned: Path) -> None:
    data = fp.data.load_data("own.py:loaders")
    network = fp.load(pruned)
    for teacher, options, error, message in (
        (None, {"distill": 0.9}, ValueError, "distill: there is no teacher; give teacher="),
        ("auto", {}, ValueError, "give it itself, teacher=model"),
        (3, {}, TypeError, "teacher: got int; a torch.nn.Module or the path of a run is needed"),
        (network, {}, ValueError, "it shares weights with the network"),
    ):
        with pytest.raises(error, match=message):
            fp.finetune(network, data, teacher=teacher, epochs=1, batch_size=16, out="tuned", **options)
        assert not Path("tuned").exists()
    fp.finetune(network, data, teacher=pruned, epochs=1, batch_size=16, out="tuned")
    assert yaml.safe_load(Path("tuned", "config.yaml").read_text())["teacher"] == str(pruned)
