"""The command line with losses, batches and networks of a user's own: every command, in a chain."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import TwoInputs

import fastprune as fp
from fastprune.cli.main import main

NETWORKS = Path(__file__).parents[1] / "shared" / "small_networks.py"

CODE = """
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

images, numbers = noise(48, 3, 16, 16), noise(48, 5, seed=1)

def three(data):
    return data, data, data

def regression():
    target = images.mean((1, 2, 3))[:, None] + numbers[:, :1]
    return three(DataLoader(TensorDataset(images, numbers, target), batch_size=16))

def masks():
    labels = (images.mean(1) > 0).long() + (images.mean(1) > 0.5).long()
    return three(DataLoader([{"image": x, "mask": y} for x, y in zip(images, labels)], batch_size=16))

def alone():
    return masks()[0]

def swapped():
    target = images.mean((1, 2, 3))[:, None] + numbers[:, :1]
    return three([{"numbers": n, "image": i, "y": y} for i, n, y in
                  zip(images.split(16), numbers.split(16), target.split(16))])

def segment(model, batch):
    return model(batch["image"])["out"], batch["mask"]

def by_name(model, batch):
    return model(batch["image"], numbers=batch["numbers"]), batch["y"]

def squared(output, target):
    return ((output - target) ** 2).mean()

def of_one(output):
    return output.mean()

def calls_nothing(model, batch):
    return batch["image"], batch["y"]

def no_pair(model, batch):
    return model(batch["image"], batch["numbers"])

three_numbers = 3
"""

CHAINS = {
    "two inputs": "--model nets.py:TwoInputs --data own.py:regression --loss own.py:squared",
    "a loss of torch": "--model nets.py:TwoInputs --data own.py:regression --loss torch.nn:MSELoss",
    "inputs by name": "--model nets.py:TwoInputs --data own.py:swapped --loss own:squared --forward own:by_name",
    "segmentation": "--model nets.py:UNet --data own.py:masks --forward own.py:segment",
}

SOME_SLOW = [pytest.param(case, marks=() if case == "two inputs" else pytest.mark.slow) for case in CHAINS]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETWORKS.read_text())
    (tmp_path / "own.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("nets", "own"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def run(line: str) -> int:
    return main(shlex.split(line))


def found(line: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert run(f"{line} --json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("case", SOME_SLOW)
def test_from_prune_to_onnx(
    case: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    measure = "accuracy" if case == "segmentation" else "loss"
    dmc = "--dmc.epochs 1 --dmc.samples 32 --dmc.batch_size 16"
    pruned = found(f"prune {CHAINS[case]} {dmc} --out runs/a", capsys)
    assert set(pruned["compact"]) == {measure, "macs", "params"}
    assert pruned["compact"]["macs"] <= 0.5 * pruned["baseline"]["macs"]
    (here / "elsewhere").mkdir()
    if "own:" not in CHAINS[case]:  # files are known by their whole paths
        monkeypatch.chdir(here / "elsewhere")
    tuned = found(f"finetune --run {here}/runs/a --epochs 2 --batch_size 16 --lr 0.05", capsys)
    assert (tuned["compact"][measure] < pruned["compact"][measure]) == (measure == "loss")
    measured = found(f"evaluate --run {here}/runs/a", capsys)
    assert measured["compact"][measure] == pytest.approx(tuned["compact"][measure], rel=1e-5)
    assert measured["baseline"][measure] == pytest.approx(pruned["baseline"][measure], rel=1e-5)
    assert measured["compact"]["macs"] == pruned["compact"]["macs"]
    network = fp.load(here / "runs" / "a")  # by the file of the factory
    assert sum(p.numel() for p in network.parameters()) == measured["compact"]["params"]
    file = found(f"export {here}/runs/a --out net.onnx", capsys)
    assert file["difference"] < 1e-4
    names = ["input"] if case == "segmentation" else ["image", "numbers"]
    assert re.findall(r"(\w+):1x", file["trtexec"]) == names
    assert run(f"evaluate --run {here}/runs/a") == 0
    assert f" {measure} ┃" in capsys.readouterr().out


def test_training_and_pruning_in_two_steps(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = found(f"train {CHAINS['two inputs']} --epochs 2 --batch_size 16 --out runs/t", capsys)
    weights = "--weights runs/t/model.safetensors"
    alone = found(f"evaluate {CHAINS['two inputs']} {weights}", capsys)
    assert alone["model"]["loss"] == pytest.approx(trained["model"]["loss"], rel=1e-5)
    assert fp.load("runs/t")(torch.zeros(3, 3, 16, 16), torch.zeros(3, 5)).shape == (3, 1)
    found(f"prune {CHAINS['two inputs']} {weights} --method l1 --budget macs=0.7 --out runs/a", capsys)
    second = found("prune --from_run runs/a --method l1 --budget macs=0.7 --out runs/b", capsys)
    assert second["compact"]["loss"] > 0
    assert second["compact"]["macs"] <= 0.7 * second["baseline"]["macs"]


def test_a_run_of_the_api_and_a_run_that_is_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    fp.prune(TwoInputs(), (torch.randn(2, 3, 16, 16), torch.randn(2, 5)), method="l1", out="runs/a")
    line = "--run runs/a --model nets.py:TwoInputs --data own.py:regression"
    assert run(f"evaluate {line}") == 2
    assert "--loss" in capsys.readouterr().err
    assert found(f"evaluate {line} --loss own.py:squared", capsys)["compact"]["loss"] > 0
    once = found(f"finetune {line} --epochs 2 --batch_size 16 --lr 0.01 --loss own.py:squared", capsys)
    network = fp.load("runs/a", model=TwoInputs())
    again = found("finetune --run runs/a --resume", capsys)  # with the loss that finetune.yaml names
    assert again["compact"] == once["compact"]
    assert all(map(torch.equal, network.parameters(), fp.load("runs/a", model=TwoInputs()).parameters()))


def test_a_dry_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview = found(f"prune {CHAINS['inputs by name']} --dry_run", capsys)
    assert preview["seconds"] > 0
    assert [group["units"] for group in preview["groups"]]


def test_inspect_takes_its_example_from_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = found("inspect nets.py:TwoInputs --data own.py:regression", capsys)
    assert [group["name"] for group in shown["groups"]] == ["image.0", "image.3", "numbers"]
    again = found("inspect nets.py:TwoInputs --data own.py:swapped --forward own.py:by_name", capsys)
    assert again["macs"] == shown["macs"]


def test_data_without_a_part_to_measure_are_odd(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate nets.py:UNet --data own.py:alone --forward own.py:segment") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "odd: own.py:alone gives training batches alone, so nothing is measured: let it return (train, held" in shown


TWO, SWAPPED = "nets.py:TwoInputs --data own.py:regression", "nets.py:TwoInputs --data own.py:swapped"
REFUSED = {
    TWO: r"whole numbers.*loss= is --loss and forward= is --forward",
    f"{TWO} --loss own.py:squard": r"loss 'own.py:squard': 'own.py' has no function 'squard' \(.*squared",
    f"{TWO} --loss own.py:three_numbers": r"--loss own.py:three_numbers: got int; a function loss\(output, target\) is",
    f"{TWO} --loss own.py:of_one": r"of_one: got of_one\(output\); it is called as loss\(output, target\): too many",
    f"{TWO} --loss own.py:DataLoader": r"the class DataLoader, which cannot be made without .*name a function",
    f"{TWO} --loss squared": r"loss 'squared': a function is named file\.py:name or package\.module:name",
    f"{TWO} --loss own.py:squared --input 3x16x16": "leave --input out",
    f"{SWAPPED} --loss own.py:squared": r"batch: got a dict of 'numbers', 'image', 'y'; .*give forward=",
    f"{SWAPPED} --forward own.py:calls_nothing": "forward: it did not call the model",
    f"{SWAPPED} --loss own.py:squared --forward own.py:no_pair": r"must return the pair \(output, target\)",
    f"{SWAPPED} --forward own.py:squared": "forward: it fails on the first batch: TypeError: unsupported operand",
    "nets.py:PlainCNN --data own.py:regression": r"model 'nets.py:PlainCNN': .*does not take 2 by position",
    "nets.py:TwoInputs": "model 'nets.py:TwoInputs'.*give --data",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"prune {line} --method l1 --out runs/a") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(REFUSED[line], error), error
    assert not Path("runs").exists()


@pytest.mark.parametrize("case", SOME_SLOW)
def test_sensitivity(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    result = found(f"sensitivity {CHAINS[case]} --ratios 0.5 --out chart --drop 0.5", capsys)
    assert result["points"]
    has_accuracy = case == "segmentation"
    assert (result["accuracy"] is not None) == has_accuracy
    assert (here / "chart" / "sensitivity.png").stat().st_size > 5000
    for point, suggested in zip(result["points"], result["keep_ratio"], strict=True):
        assert point["kept"] == round(0.5 * point["size"])
        rise = point["loss"] / result["loss"] - 1
        lost = result["accuracy"] - point["accuracy"] if has_accuracy else rise
        assert suggested == f"{point['group']}={0.5 if lost <= 0.5 else 1}:1"
    assert run(f"sensitivity {CHAINS[case]} --ratios 0.5") == 0
    printed = capsys.readouterr().out
    assert ("held-out accuracy in %" if has_accuracy else "held-out loss over") in printed
