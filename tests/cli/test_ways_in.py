"""The command line with networks, data and weights of a user's own, and arguments as people type them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

import fastprune as fp
from fastprune.cli.main import main

NETWORK = """
from torch import nn

def net(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""

DATA = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def loaders():
    torch.manual_seed(0)
    images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    parts = TensorDataset(images[:48], labels[:48]), TensorDataset(images[48:], labels[48:])
    return tuple(DataLoader(part, batch_size=16) for part in parts)

def three():
    train, held_out = loaders()
    return train, held_out, held_out

def one():
    return loaders()[0]

def vectors():
    return [(torch.randn(8, 5), torch.zeros(8).long())]

def nothing():
    return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_net.py").write_text(NETWORK)
    (tmp_path / "my_data.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_net", "my_data", "sized"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def run(line: str) -> int:
    return main(shlex.split(line))


@pytest.mark.parametrize(("model", "data"), [("my_net.py:net", "my_data.py:three"), ("my_net:net", "my_data:three")])
def test_a_network_and_data_of_ones_own_from_the_current_folder(
    model: str, data: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dmc = "--dmc.epochs 1 --dmc.samples 32 --dmc.batch-size 16"
    assert run(f"prune {model} --data {data} {dmc} --budget 50% --json") == 0
    out, err = capsys.readouterr()
    assert "fastprune: files go to runs/dmc-net-1\n" in err
    assert "fastprune: dmc: groups auto = all, because this network has no residual blocks\n" in err
    found = json.loads(out)
    assert found["compact"]["macs"] <= 0.5 * found["baseline"]["macs"]
    assert 0 <= found["compact"]["accuracy"] <= 1
    (here / "elsewhere").mkdir()
    if model.startswith("my_net.py"):  # a file is known by its whole path
        monkeypatch.chdir(here / "elsewhere")
    assert run(f"finetune --run {here}/runs/dmc-net-1 --epochs 1 --batch-size 16") == 0
    assert run(f"evaluate --run {here}/runs/dmc-net-1") == 0


def test_without_a_test_set_the_held_out_part_is_measured(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune my_net.py:net --data my_data.py:loaders --method l1 --out a --json") == 0
    assert 0 <= json.loads(capsys.readouterr().out)["compact"]["held_out_accuracy"] <= 1
    assert run("evaluate --run a") == 0
    assert "held-out accuracy" in capsys.readouterr().out


def test_runs_get_the_next_free_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        assert run("prune resnet20 --method l1 --budget macs=0.6") == 0
        assert f"files go to runs/l1-resnet20-{number}\n" in capsys.readouterr().err
    assert run("prune --from-run runs/l1-resnet20-1 --method l1 --budget 0.5") == 0
    assert "files go to runs/l1-l1-resnet20-1-1\n" in capsys.readouterr().err
    assert run("prune runs/l1-resnet20-1 --method l1") == 2
    hint = "'runs/l1-resnet20-1' is a run; to prune its network further give --from_run runs/l1-resnet20-1"
    assert hint in capsys.readouterr().err
    assert run("train my_net.py:net --data my_data.py:one --epochs 1 --batch_size 16") == 0
    assert (here / "runs" / "train-net-1" / "model.safetensors").is_file()
    assert run("prune resnet20 --method l1 --resume") == 2
    assert "--out is needed" in capsys.readouterr().err


def test_options_with_hyphens_and_the_model_as_first_word(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--method=l1 --compensate=none --round-to=8 --l1.ranking global --data digits --image-size 16"
    assert run(f"prune resnet20 {options} --out a") == 0
    config = yaml.safe_load((here / "a" / "config.yaml").read_text())
    assert (config["model"], config["round_to"], config["image_size"]) == ("resnet20", 8, 16)
    assert run("inspect resnet20 --json") == 0
    capsys.readouterr()
    for line, message in {
        "inspect resnet50": "did you mean torchvision:resnet50",
        "prun --model resnet20": "there is no command 'prun': did you mean 'prune'?",
        "inspect resnet20 --kep-class": "did you mean --keep_class?",
        "prune resnet20 --method l1 --data my_data.py:vectors": "cannot take inputs of 5: .*--forward file.py:f",
        "prune resnet20 --method l1 --data my_data.py:nothing": "returned a int as train",
        "prune resnet20 --method l1 --data my_data.py:gone": "no function 'gone'",
        "prune resnet20 --method l1 --data my_data.py:one --held-out 0.1": "held_out: the function",
        "prune resnet20 --method l1 --data digits --mean 0.5": "both are needed",
        "prune resnet20 --method l1 --data digits --mean 0.5 0.5 --std 1 1": r"1 channel\(s\)",
    }.items():
        assert run(line) == 2, line
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert not (here / "runs").exists()


def test_a_function_is_asked_for_sizes_only_if_it_takes_them(here: Path) -> None:
    head = "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, {0}))"
    body = "return nn.Sequential(nn.Conv2d({1}, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), " + head
    source = ["from torch import nn"]
    for name, arguments, classes, channels in (
        ("fixed", "", "10", "1"),
        ("asked", "num_classes, in_channels", "num_classes", "in_channels"),
        ("any", "**sizes", "sizes['num_classes']", "sizes['in_channels']"),
    ):
        source += [f"def {name}({arguments}):", "    " + body.format(classes, channels)]
    (here / "sized.py").write_text("\n".join(source))
    for name in ("fixed", "asked", "any"):
        assert run(f"prune sized.py:{name} --data digits --method l1 --compensate none --out {name}") == 0
        assert run(f"evaluate --run {name}") == 0


@pytest.mark.parametrize(("name", "message"), [("three", "cannot take images of 1x8x8"), ("four", "10 classes.* 4 ap")])
def test_a_function_of_other_sizes_is_refused(
    name: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    channels, classes = (3, 10) if name == "three" else (1, 4)
    layers = f"nn.Conv2d({channels}, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, {classes})"
    (here / "sized.py").write_text(f"from torch import nn\ndef {name}(): return nn.Sequential({layers})\n")
    assert run(f"prune sized.py:{name} --data digits --method l1 --out a") == 2
    assert re.search(message, capsys.readouterr().err)


def test_means_and_deviations(here: Path) -> None:
    assert run("prune resnet20 --method l1 --compensate none --data digits --mean 0.25 --std 0.5 --out a") == 0
    config = yaml.safe_load((here / "a" / "config.yaml").read_text())
    assert (config["mean"], config["std"]) == ([0.25], [0.5])
    assert run("evaluate --run a") == 0


def test_moving_averages_and_named_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(here))
    from my_net import net  # type: ignore[import-not-found]

    plain, ema = net().state_dict(), net().state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": ema}, here / "best.ckpt")
    assert run("prune my_net.py:net --weights best.ckpt --method l1 --out a") == 0
    assert capsys.readouterr().err.count("took 'state_dict'; 'state_dict_ema' is there too") == 1
    assert run("prune my_net.py:net --weights best.ckpt --ema --method l1 --out b") == 0
    assert "took 'state_dict_ema'" in capsys.readouterr().err
    assert (here / "a" / "model.safetensors").read_bytes() != (here / "b" / "model.safetensors").read_bytes()
    assert run("inspect my_net.py:net --weights DEFAULT") == 2
    assert "has no weights of that name" in capsys.readouterr().err


def test_a_run_of_the_python_interface_keeps_the_name_of_its_data(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fp.models.create("resnet20", num_classes=10, in_channels=1)
    digits = {"data": "digits", "held_out": 0.2}
    fp.prune(model, torch.zeros(1, 1, 8, 8), method="l1", compensate="none", out=here / "run", **digits)
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert (config["data"], config["held_out"]) == ("digits", 0.2)
    assert run("evaluate run --json") == 0
    assert json.loads(capsys.readouterr().out).keys() == {"baseline", "compact"}
    assert run("finetune run --epochs 1 --batch_size 512") == 0
