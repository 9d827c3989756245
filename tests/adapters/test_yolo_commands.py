"""Ultralytics networks on the command line: ``--model yolo:…`` and ``--data yolo:…``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_yolo import SIDE, make_data, make_network

from fastprune.cli.main import main
from fastprune.graph.plan import PruningPlan

pytest.importorskip("ultralytics")
yolo = pytest.importorskip("fastprune.adapters.yolo")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ultralytics warns of much


def test_a_run_is_pruned_measured_compensated_exported_and_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_network(tmp_path, "detect").save("tiny.pt")
    data = make_data(tmp_path / "data", "detect")
    command = ["prune", "--model", "yolo:tiny.pt", "--data", f"yolo:{data}", "--image_size", str(SIDE)]
    assert main([*command, "--method", "taylor", "--budget", "flops=0.5", "--out", "run"]) == 0
    printed = capsys.readouterr()
    assert f"next, in Python: fastprune.adapters.yolo.load('run').train(data='{data}')" in printed.out
    assert "the weights are random" not in printed.err
    plan = PruningPlan.load(Path("run/plan.json"))
    assert plan.macs[1] <= 0.5 * plan.macs[0]
    assert plan.code == "own"

    assert main(["evaluate", "--run", "run", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["compact"]["macs"] == plan.macs[1]
    assert results["compact"]["loss"] > 0
    assert main(["calibrate", "run", "--how", "bn", "--out", "again"]) == 0
    assert main(["export", "run", "--out", "net.onnx"]) == 0

    small = yolo.load("run")
    assert small.names == {0: "0", 1: "1"}
    train = {"epochs": 1, "imgsz": SIDE, "batch": 3, "workers": 0, "plots": False, "device": "cpu"}
    small.train(data=str(data), project=str(tmp_path / "trained"), **train)
    assert sum(p.numel() for p in small.model.parameters()) == plan.params[1]


def test_what_ultralytics_does_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_network(tmp_path, "detect")
    model, data = "yolo:tiny-detect.yaml", f"yolo:{make_data(tmp_path / 'data', 'detect')}"
    cases = {
        "Ultralytics trains on them": ["train", "--model", model, "--data", data],
        "takes data of Ultralytics": ["prune", "--model", model, "--data", "synthetic:3x64x64:2", "--method", "l1"],
        "sensitivity does not take them": ["sensitivity", "--model", model, "--data", data],
        "one of Ultralytics' YOLOs": ["prune", "--model", "resnet20", "--data", data, "--method", "l1"],
        "have a loss and a forward": ["prune", "--model", model, "--data", data, "--loss", "torch.nn:MSELoss"],
        "--held_out: 'yolo:": ["prune", "--model", model, "--data", data, "--held_out", "5"],
        "'yolo:other.yaml'": ["prune", "--model", model, "--data", "yolo:other.yaml", "--method", "l1"],
    }
    for number, (expected, command) in enumerate(cases.items()):
        size = ["--image_size", str(SIDE)] if data in command and command[0] == "prune" else []
        assert main([*command, *size, "--out", f"run{number}"]) == 2
        assert expected in capsys.readouterr().err
        assert not Path(f"run{number}").exists()


def test_a_run_of_the_adapter_is_loaded(tmp_path: Path) -> None:
    network = make_network(tmp_path, "classify")
    small = yolo.prune(network, image_size=SIDE, out=tmp_path / "run")
    again = yolo.load(tmp_path / "run")
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(again.model.eval()(images)[1], small.model.eval()(images)[1])


def test_a_folder_is_no_data_set_for_detection(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data", "detect").parent
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"give a \.yaml file, or for classification a folder with train/"):
        yolo.DataSet(folder)
    assert sorted(tmp_path.rglob("*")) == before
    data, _ = yolo.DataSet(folder, SIDE, classify=False).open(make_network(tmp_path, "detect").model)  # its data.yaml
    (inputs, _), *_ = data.batches("test", 6)
    assert sum(len(labels["cls"]) for labels in inputs["labels"]) == 4
    assert not folder.with_name("data_split").exists()


def test_classification_needs_no_validation_part(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data", "classify")
    shutil.rmtree(folder / "val")
    small = yolo.prune(make_network(tmp_path, "classify"), method="taylor", data=folder, image_size=SIDE, images=6)
    assert small.pruning.plan.macs[1] <= 0.5 * small.pruning.plan.macs[0]


def test_the_size_of_images_is_that_of_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_network(tmp_path, "classify")
    macs = []
    for size in ([], ["--input", "3x224x224"]):
        assert main(["inspect", "--model", "yolo:tiny-classify.yaml", *size, "--json"]) == 0
        macs.append(json.loads(capsys.readouterr().out)["macs"])
    assert macs[0] == macs[1]


def test_a_batch_can_be_run_twice(tmp_path: Path) -> None:
    network = make_network(tmp_path, "detect").model.eval()
    data, objective = yolo.DataSet(make_data(tmp_path / "data", "detect"), SIDE).open(network)
    batch = next(data.batches("test", 6))
    losses = []
    with torch.no_grad():
        for _ in range(2):
            output, target = objective.run(network, *batch)
            losses.append(float(objective.compute(output, target)))
    assert losses[0] == losses[1]


def test_a_run_of_another_network_is_refused(tmp_path: Path) -> None:
    assert main(["prune", "--model", "resnet20", "--method", "l1", "--out", "run"]) == 0
    with pytest.raises(ValueError, match="no run of a network that was named yolo:FILE"):
        yolo.load("run")
