"""Loggers and callbacks: every record, once, on disk where it belongs."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastprune as fp
from fastprune.cli.main import main
from fastprune.data import load_data
from fastprune.engine import RunDirectory, TrainConfig, train
from fastprune.engine.loggers import Logger, LoggerError, flatten, load_logger, split_names
from fastprune.engine.loggers.csv_file import CSVFile
from fastprune.methods.gates.dmc import DMC

DATA = "synthetic:3x8x8:4:64"
OPTIONS = {"epochs": 2, "batch_size": 16, "samples": 32, "evaluate_every": 1}


class Kept:
    """A logger that keeps its records."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.closed = 0

    def log(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


def prune(**arguments: Any) -> fp.PruningResult:
    model = fp.models.create("resnet20", num_classes=4)
    data = load_data(DATA)
    return fp.prune(model, torch.zeros(1, 3, 8, 8), budget="flops=0.6", data=data, **OPTIONS, **arguments)


def test_objects_and_callbacks_get_every_line_of_the_log(tmp_path: Path) -> None:
    kept, seen = Kept(), []
    assert isinstance(kept, fp.Logger)
    prune(out=tmp_path / "run", log=[kept, "csv"], callbacks=[seen.append])
    lines = RunDirectory.open(tmp_path / "run").metrics()
    assert json.loads(json.dumps(kept.records)) == lines
    assert seen == kept.records
    assert kept.closed == 0  # its owner closes it
    assert [line["stage"] for line in lines].count("plan") == 1
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows[:-1]] == [str(line["step"]) for line in lines[:-1]]
    assert float(rows[0]["loss"]) == pytest.approx(lines[0]["loss"])
    assert float(rows[-1]["macs/planned"]) == lines[-1]["macs"]["planned"]


def test_callbacks_need_no_directory() -> None:
    seen: list[Mapping[str, Any]] = []
    data = load_data(DATA)
    config = TrainConfig(epochs=2, batch_size=32)
    train(fp.models.create("resnet20", num_classes=4), data, config, device="cpu", callbacks=[seen.append])
    assert [record["epoch"] for record in seen] == [0, 1]
    assert {record["stage"] for record in seen} == {"training"}


def test_an_error_in_a_callback_ends_the_run() -> None:
    def stop(record: Mapping[str, Any]) -> None:
        raise StopIteration("enough")

    with pytest.raises((StopIteration, RuntimeError), match="enough"):
        prune(callbacks=[stop])


def test_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = f"train --model resnet20 --data {DATA} --epochs 2 --batch_size 32 --device cpu --log tensorboard,csv"
    assert main([*line.split(), "--out", str(tmp_path / "run")]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "training"))
    events.Reload()
    lines = RunDirectory.open(tmp_path / "run").metrics()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [(x["step"], x["loss"]) for x in lines]


def test_the_table_of_a_resumed_run_begins_with_its_log(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    table = CSVFile(run.path, {})
    for step in (1, 2, 3):
        run.log({"stage": "search", "step": step, "loss": 1.0})
        table.log({"stage": "search", "step": step, "loss": 1.0})
    (line, *_) = run.metrics_path.read_text().splitlines()
    run.truncate_metrics(len(line) + 1)  # as a run does that resumes behind step 1
    again = CSVFile(run.path, {})
    run.log({"stage": "search", "step": 2, "loss": 5.0, "more": 7.0})
    again.log({"stage": "search", "step": 2, "loss": 5.0, "more": 7.0})
    with again.path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"], row["more"]) for row in rows] == [("1", "1.0", ""), ("2", "5.0", "7.0")]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (["tensorbord"], "log 'tensorbord': no logger has this name: did you mean 'tensorboard'?"),
        ([3], r"log 3: a name, or an object with the methods log\(record\) and close\(\), is needed"),
        (["csv"], "log: a logger by name writes beside the run's files: give out="),
    ],
)
def test_refusals(log: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(log=log)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "fastprune.engine.loggers.wandb_run", raising=False)
    with pytest.raises(
        LoggerError, match=r"log 'wandb': the package 'wandb' is needed: pip install 'fastprune\[wandb\]'"
    ):
        load_logger("wandb")


def test_a_logger_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("their_logger")
    made: list[Kept] = []

    def make(folder: Path, config: Mapping[str, Any]) -> Kept:
        assert folder == tmp_path / "run"
        assert config["method"] == "dmc"
        made.append(Kept())
        return made[0]

    module.make = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_logger", module)
    point = EntryPoint("theirs", "their_logger:make", "fastprune.loggers")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [point])
    prune(out=tmp_path / "run", log=["theirs"], method=DMC)
    assert made[0].closed == 1
    assert made[0].records[-1]["stage"] == "plan"


def test_results_of_commands_reach_loggers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Kept] = []

    class Theirs(Kept):
        def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
            super().__init__()
            made.append(self)

        def log(self, record: Mapping[str, Any]) -> None:
            assert not self.closed
            super().log(record)

    module = ModuleType("their_logger")
    module.make = Theirs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_logger", module)
    points = [
        EntryPoint("theirs", "their_logger:make", "fastprune.loggers"),
        EntryPoint("csv", "fastprune.engine.loggers.csv_file:CSVFile", "fastprune.loggers"),
    ]
    found = importlib.metadata.entry_points
    monkeypatch.setattr(
        "importlib.metadata.entry_points",
        lambda **group: points if group == {"group": "fastprune.loggers"} else found(**group),
    )
    out = tmp_path / "run"
    line = f"prune --model resnet20 --data {DATA} --method l1 --device cpu --log theirs,csv --out {out}"
    assert main(line.split()) == 0
    assert main(f"finetune --run {out} --epochs 1 --batch_size 32 --device cpu --log theirs,csv".split()) == 0
    lines = RunDirectory.open(out).metrics()
    assert [record["stage"] for record in lines] == ["plan", "result", "finetune", "result"]
    assert json.loads(json.dumps([*made[0].records, *made[1].records])) == lines
    assert [logger.closed for logger in made] == [1, 1]
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == [record["stage"] for record in lines]
    assert float(rows[-1]["compact/accuracy"]) == lines[-1]["compact"]["accuracy"]
    assert main(f"finetune --run {out} --epochs 1 --lr nan --device cpu --log theirs".split()) == 2
    assert [logger.closed for logger in made] == [1] * len(made)


def test_what_makes_a_logger_is_one_too(tmp_path: Path) -> None:
    made: list[Kept] = []

    def make(folder: Path, config: Mapping[str, Any]) -> Kept:
        made.append(Kept())
        return made[0]

    prune(out=tmp_path / "run", log=[make])
    assert made[0].closed == 1
    assert json.loads(json.dumps(made[0].records)) == RunDirectory.open(tmp_path / "run").metrics()
    with pytest.raises(LoggerError, match=r"log None: a name, or an object with the methods log\(record\)"):
        prune(out=tmp_path / "other", log=[lambda folder, config: None])


def test_names_and_numbers() -> None:
    assert split_names("wandb, csv,") == ["wandb", "csv"]
    assert split_names(None) == []
    assert flatten({"a": {"b": 1, "c": None}, "d": "x", "e": [1]}) == {"a/b": 1, "d": "x"}
    assert not isinstance(object(), Logger)
