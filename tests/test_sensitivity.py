"""Accuracy over the part of a group that stays, and the suggestion that follows."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import fastprune as fp
from fastprune.cli.main import main
from fastprune.data import load_data
from fastprune.engine import evaluate
from fastprune.methods.scores.filters import unit_norms
from fastprune.sensitivity import Point, Sensitivity

DATA = "synthetic:3x8x8:4:128"


def test_measurements_are_those_of_the_masked_network() -> None:
    torch.manual_seed(0)
    data, example = load_data(DATA), torch.zeros(1, 3, 8, 8)
    model = fp.models.create("resnet20", num_classes=4).eval()
    found = fp.sensitivity(model, example, data, ratios=[0.5, 0.25])
    graph = fp.trace(model, example)
    assert [p.ratio for p in found.points] == [0.25, 0.5] * len(graph.groups)
    full = evaluate(model, data, "held_out")
    assert (found.accuracy, found.samples) == (full["accuracy"], full["samples"])
    assert found.loss == pytest.approx(full["loss"], rel=1e-5)
    group, norms = graph.groups[3], unit_norms(graph, model, p=1)
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    mask[group.units] = False
    best = norms[group.units].argsort(descending=True)[: group.size // 4] + group.start
    mask[best] = True
    compact = fp.apply(graph.plan(mask), model)
    expected = evaluate(compact, data, "held_out")
    (point,) = [p for p in found.of_group(group.name) if p.ratio == 0.25]
    assert point.kept == group.size // 4
    assert point.loss == pytest.approx(expected["loss"], rel=1e-4)
    assert point.accuracy == expected["accuracy"]


def test_the_suggestion_ends_where_accuracy_first_falls() -> None:
    accuracies = {"a": (0.9, 0.5, 0.9), "b": (0.5, 0.89, 0.9), "c": (0.9, 0.9, 0.9), "d": (0.1, 0.1, 0.1)}
    points = tuple(
        Point(name, ratio, 1, 4, accuracy, 0.0)
        for name, row in accuracies.items()
        for ratio, accuracy in zip((0.25, 0.5, 0.75), row, strict=True)
    )
    found = Sensitivity(0.9, 0.0, 100, points)
    assert found.suggest(0.02) == {"a": 0.75, "b": 0.5, "c": 0.25, "d": 1.0}
    assert found.keep_ratio(0.02) == ("a=0.75:1", "b=0.5:1", "c=0.25:1", "d=1:1")


def test_the_file_is_a_config_of_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"--model resnet20 --data {DATA} --device cpu"
    ask = f"sensitivity {line} --ratios 0.25 0.5 --drop 0.5 --out {tmp_path}/sens --json"
    assert main(shlex.split(ask)) == 0
    printed = json.loads(capsys.readouterr().out)
    file = tmp_path / "sens" / "keep_ratio.yaml"
    assert yaml.safe_load(file.read_text())["keep_ratio"] == printed["keep_ratio"]
    assert (tmp_path / "sens" / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    prune = f"prune {line} --method l1 --budget flops=0.8 --config {file} --out {tmp_path}/run"
    assert main(shlex.split(prune)) == 0
    assert main(shlex.split(ask)) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratios", "held_out", "message"),
    [([0.0], 0.1, r"ratios \[0.0\]: numbers above 0 and below 1"), ([0.5], 0, "holds nothing out to measure on")],
)
def test_refusals(ratios: list[float], held_out: float, message: str) -> None:
    model = fp.models.create("resnet20", num_classes=4)
    with pytest.raises(ValueError, match=message):
        fp.sensitivity(model, torch.zeros(1, 3, 8, 8), load_data(DATA, held_out=held_out), ratios=ratios)


def test_the_command_measures_five_ratios_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    line = "sensitivity --model resnet20 --data synthetic:3x8x8:4:64 --held_out 8 --json"
    assert main([*line.split(), "--ignore", "layer2*", "layer3*", "conv1"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert sorted({round(point["kept"] / point["size"], 1) for point in points})[-1] == 0.9
    assert len(points) == 5 * len({point["group"] for point in points})
