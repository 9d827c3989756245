"""The commands of a report make the same settings again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastprune as fp
from fastprune.cli.main import main
from fastprune.engine import Placement, RunDirectory
from fastprune.job import RunOptions
from fastprune.planning.goal import Goal
from fastprune.report.command import commands
from fastprune.report.log import PruningRun

WriteRun = Callable[..., Path]


def remake(run: PruningRun) -> list[str]:
    return commands(run.config, run.finetuning, f"runs/{run.name}")


def words(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))[1:]


def test_a_run_is_made_again(tmp_path: Path, capfd: Any) -> None:
    data = "--model resnet20 --data synthetic:3x8x8:4:64 --budget flops=0.6 --device cpu --seed 3 --round_to 4"
    options = "--method dmc --dmc.epochs 1 --dmc.samples 16 --dmc.batch_size 8 --ignore conv1 'layer3.*' --keep_class"
    assert main(shlex.split(f"prune {data} {options} --out {tmp_path}/runs/first")) == 0
    tuning = "--epochs 1 --lr 0.01 --milestones [0.25,0.75] --batch_size 32 --device cpu"
    assert main(shlex.split(f"finetune --run {tmp_path}/runs/first {tuning}")) == 0
    prune, finetune = remake(PruningRun.read(tmp_path / "runs" / "first", "second"))
    assert "--dmc.epochs 1" in prune
    assert "--precision" not in prune  # a default
    assert main(words(prune)) == 0
    assert main([*words(finetune), "--device", "cpu"]) == 0
    first, second = RunDirectory.open(tmp_path / "runs/first"), RunDirectory.open("runs/second")
    assert first.config == second.config
    assert first.plan_path.read_text() == second.plan_path.read_text()
    tuned = [yaml.safe_load((run.path / "finetune.yaml").read_text()) for run in (first, second)]
    assert tuned[0] == tuned[1]


def test_a_demonstration(write_run: WriteRun) -> None:
    run = PruningRun.read(write_run("d", [], command="demo", seed=2, model="resnet20"))
    assert remake(run) == ["fastprune demo --seed 2 --out runs/d"]


def test_a_run_of_the_api(write_run: WriteRun) -> None:
    (text,) = remake(PruningRun.read(write_run("api", [])))
    assert "fp.prune(" in text
    assert "    method='dmc',\n    budget='flops=0.5',\n    seed=0,\n    compensate='none',\n    epochs=2,\n" in text
    compile(text, "report", "exec")


def test_the_conditions_of_a_latency_budget() -> None:
    def record(net: object, example: object, **arguments: Any) -> dict[str, Any]:
        return arguments

    names = {"fp": fp, "record": record, "net": None, "example": None}
    conditions = fp.Conditions("cpu", batch=4, dtype="bfloat16", channels_last=True)
    settings = RunOptions(Placement(), 0, None, None, False, {}).settings()
    for given in (conditions, None):
        goal = Goal.make("latency=0.6", given, None, torch.device("cpu"))
        (text,) = commands({"command": "prune", "method": "l1", **goal.settings(), **settings}, {}, "run")
        call = eval(text.partition("\n\n")[2].replace("fp.prune(", "record("), names)
        assert call["budget"] == "latency=0.6"
        assert call["conditions"] == (given or fp.Conditions("cpu"))
    (text,) = commands({"command": "prune", "method": "l1", "budget": "flops=0.5", "seed": 0}, {}, "run")
    assert "conditions" not in text


def test_a_call_of_a_method_that_searches_names_its_data(write_run: WriteRun) -> None:
    (text,) = remake(PruningRun.read(write_run("api", [])))
    assert "    net, example, data=data,\n" in text
    (text,) = remake(PruningRun.read(write_run("l1", [], method="l1")))
    assert "data" not in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data": "digits", "compensate": "sequential"}, None),
        ({"data": "digits", "compensate": "bn"}, "--compensate bn"),
        ({"data": "digits", "compensate": "none"}, "--compensate none"),
        ({"data": "digits"}, "--compensate none"),  # a run of an earlier version
        ({"compensate": "none"}, None),
    ],
)
def test_how_weights_were_compensated(write_run: WriteRun, settings: dict[str, str], expected: str | None) -> None:
    path = write_run("c", [], model="resnet20", **settings)
    (text,) = remake(PruningRun.read(path))
    assert ("--compensate" in text) == (expected is not None)
    assert (expected or "") in text


def test_a_loss_of_ones_own(write_run: WriteRun) -> None:
    run = PruningRun.read(write_run("own", [], model="net.py:make", loss="own.py:loss", forward="own.py:forward"))
    prune, tune = commands(run.config, {"loss": "own.py:other", "epochs": 3}, "runs/own")
    assert "--forward own.py:forward --loss own.py:loss" in " ".join(words(prune))
    assert words(tune)[:6] == ["finetune", "--run", "runs/own", "--loss", "own.py:other", "--epochs"]


def test_quotes(write_run: WriteRun) -> None:
    (text,) = remake(PruningRun.read(write_run("q", [], model="resnet20", data="cifar10:my folder; rm")))
    assert "'cifar10:my folder; rm'" in text


def test_a_method_that_is_not_installed(write_run: WriteRun) -> None:
    (text,) = remake(PruningRun.read(write_run("q", [], model="resnet20", method="gone", gone={"a": 1})))
    assert "--method gone" in text
    assert "--gone.a 1" in text
