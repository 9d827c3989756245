"""The last lines of each command: what is odd, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fastprune.cli.advice import at_chance, too_few
from fastprune.cli.main import main
from fastprune.data import load_data

DATA = "synthetic:3x8x8:4:256"


def last_line(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert main(shlex.split(line)) == 0
    printed = capsys.readouterr()
    return printed.out.splitlines()[-1], printed.err


@pytest.mark.slow
def test_commands_lead_from_one_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    last, _ = last_line(f"train --model resnet20 --data {DATA} --epochs 1 --out t", capsys)
    assert last == f"next: fastprune prune --model resnet20 --weights t/model.safetensors --data {DATA} --out RUN"
    follow = last.removeprefix("next: fastprune ").replace("RUN", "'a run'")
    last, err = last_line(f"{follow} --method l1", capsys)
    assert last == "next: fastprune finetune --run 'a run' --teacher auto"
    assert "warning" not in err
    last, _ = last_line(f"{last.removeprefix('next: fastprune ')} --epochs 1", capsys)
    assert last == "next: fastprune report --run 'a run'"
    last, _ = last_line("evaluate --run 'a run'", capsys)
    assert last == "next: fastprune report --run 'a run'"
    last, _ = last_line("inspect --model resnet20", capsys)
    assert last == "next: fastprune prune --model resnet20 --weights FILE --data DATA --out RUN"


def test_random_weights_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, err = last_line(f"prune --model resnet20 --method l1 --out {tmp_path}/run", capsys)
    assert err.startswith("warning: no --weights: the weights are random")
    assert last == f"next: fastprune finetune --run {tmp_path}/run --data DATA"
    assert main(shlex.split(f"prune --model resnet20 --method l1 --out {tmp_path}/other --json")) == 0
    assert "next:" not in capsys.readouterr().out


def test_sensitivity_warns_of_random_weights_and_few_samples(capsys: pytest.CaptureFixture[str]) -> None:
    line = "sensitivity --model resnet20 --data synthetic:3x8x8:4:64 --ratios 0.5 --device cpu"
    assert main(shlex.split(line)) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: no --weights: the weights are random, so the accuracy means nothing")
    assert "more than --drop 0.01: hold out 100 (--held_out)" in printed.out.replace("\n", " ").replace("  ", " ")


def test_few_samples() -> None:
    assert too_few(100, 0.01) == too_few(12, 0.1) == too_few(12, 0.0) == []
    (line,) = too_few(12, 0.01)
    assert line == "odd: one of 12 held-out samples is 8.3 %, more than --drop 0.01: hold out 100 (--held_out)"


def test_accuracies_at_chance() -> None:
    data = load_data(DATA)
    assert at_chance({"baseline": {"accuracy": 0.9}, "compact": {"accuracy": 0.8}}, data) == []
    (line,) = at_chance({"baseline": {"accuracy": 0.9}, "compact": {"accuracy": 0.26}}, data)
    assert line == (
        "odd: the compact network is at chance (25.0 % for 4 classes), as pruned networks often are: fine-tune it"
    )
    (line,) = at_chance({"baseline": {"accuracy": 0.25}, "compact": {"accuracy": 0.26}}, data)
    assert line.startswith("odd: the baseline and the compact are at chance")
    assert line.endswith("are the weights trained on these data?")
    (line,) = at_chance({"compact": {"accuracy": 0.2}}, data)
    assert "train it longer" in line
    (line,) = at_chance({"model": {"accuracy": 0.2}}, data, trained=True)
    assert line == "odd: the model is at chance (25.0 % for 4 classes): train it longer, or with another --lr"
    assert at_chance({"model": {}}, None) == []
