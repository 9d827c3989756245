"""Random samples with the same number of each class, and those without, which are drawn as before."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastprune.cli.main import main
from fastprune.data import Data, Split, load_data
from fastprune.data.data import alternate, held_out_part
from fastprune.engine import HeldOut, Placement
from fastprune.host.distributed import Distributed

UNEVEN = np.repeat(np.arange(4), [40, 10, 25, 25])


def count(data: Data, split: Split, samples: int | None = None, seed: int = 0) -> list[int]:
    labels = [labels for _, labels in data.batches(split, 16, seed=seed, samples=samples, complete=True)]
    return torch.bincount(torch.cat(labels), minlength=data.num_classes).tolist()


def test_classes_alternate() -> None:
    order = np.random.default_rng(0).permutation(100)
    found = alternate(order, UNEVEN)
    assert sorted(found) == list(range(100))
    for n in range(4, 41, 4):
        assert set(np.bincount(UNEVEN[found[:n]])) == {n // 4}
    assert np.bincount(UNEVEN[found[:42]]).max() == 11
    for label in range(4):  # within a class the order stays
        assert [i for i in found if UNEVEN[i] == label] == [i for i in order if UNEVEN[i] == label]


@pytest.mark.parametrize(("amount", "each"), [(0.2, 5), (20, 5), (23, 5), (36, 9), (0, 0)])
def test_the_held_out_part(amount: float, each: int) -> None:
    part = held_out_part(100, 0, amount, UNEVEN)
    assert np.bincount(UNEVEN[part], minlength=4).tolist() == [each] * 4
    assert len(set(part)) == len(part)
    assert not each or set(part) != set(held_out_part(100, 1, amount, UNEVEN))


@pytest.mark.parametrize("amount", [2, 40, 0.9])
def test_too_few_or_too_many(amount: float) -> None:
    with pytest.raises(ValueError, match="smallest class has 10; give a number from 4 to 36"):
        held_out_part(100, 0, amount, UNEVEN)


def test_without_it_nothing_changes() -> None:
    """The positions are those that earlier versions drew."""
    assert held_out_part(100, 0, 5).tolist() == [6, 89, 21, 70, 42]
    assert held_out_part(100, 0, 5.0).tolist() == held_out_part(100, 0, 0.05).tolist() == [6, 89, 21, 70, 42]
    data = load_data("synthetic:1x4x4:4:90", held_out=0.2)
    assert not data.balanced
    assert len(set(count(data, "train", 30))) > 1


@pytest.mark.parametrize("amount", [-1, -0.5, -1e-9, 2.5, 100, 100.0, 1e9, float("nan"), float("inf")])
def test_neither_a_number_nor_a_fraction(amount: float) -> None:
    with pytest.raises(
        ValueError, match=r"held_out .*: give a number of samples below the 100 of the training set, or"
    ):
        held_out_part(100, 0, amount)


@pytest.mark.parametrize("spec", ["digits", "synthetic:1x4x4:3:100"])
def test_data_sets(spec: str) -> None:
    data = load_data(spec, balanced=True, held_out=0.1)
    assert data.balanced
    assert len(set(count(data, "held_out"))) == 1
    assert data.size("train") + data.size("held_out") == load_data(spec, held_out=0).size("train")
    assert set(count(data, "train", 5 * data.num_classes)) == {5}
    more = count(data, "train", 5 * data.num_classes + 1)
    assert sorted(more)[-2:] == [5, 6]
    assert count(data, "train", 20) == count(data, "train", 20)
    images = [next(iter(data.batches("train", 8, seed=seed, samples=8)))[0] for seed in (0, 1)]
    assert not torch.equal(*images)
    moved = data.to(torch.device("cpu"))
    assert moved.balanced
    assert count(moved, "held_out") == count(data, "held_out")


@pytest.mark.parametrize("kind", ["imagefolder", "hf"])
def test_folders_of_pictures(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    if kind == "hf":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part in ("train", "val"):
        for label, pictures in (("cat", 6), ("dog", 4)):
            (tmp_path / "set" / part / label).mkdir(parents=True)
            for index in range(pictures):
                image.new("RGB", (8, 8)).save(tmp_path / "set" / part / label / f"{index}.png")
    data = load_data(f"{kind}:{tmp_path}/set", balanced=True, held_out=0.4, image_size=8, workers=0)
    assert count(data, "held_out") == [2, 2]


def test_the_first_held_out_images_are_balanced_too() -> None:
    data = load_data("synthetic:1x4x4:4:400", balanced=True, held_out=0.5)
    _, labels = HeldOut(data, Placement(), Distributed(), batch_size=7).held_out_batch(40)
    assert torch.bincount(labels).tolist() == [10] * 4


def test_a_function_of_ones_own_chooses_itself(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def make():\n    raise AssertionError\n")
    with pytest.raises(ValueError, match="balanced: the function"):
        load_data(f"{tmp_path}/own.py:make", balanced=True)


def test_a_run_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = "synthetic:3x8x8:4:64", tmp_path / "run"
    train = f"train --model resnet20 --data {data} --epochs 1 --batch_size 16 --device cpu --out {run}"
    assert main(shlex.split(f"{train} --held_out 0.25 --balanced")) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["balanced"] is True
    assert main(shlex.split(f"train --resume --out {run}")) == 0
    # A run of an earlier version says nothing of it.
    del config["balanced"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert main(shlex.split(f"train --resume --out {run}")) == 0
    assert main(shlex.split(f"train --resume --out {run} --balanced")) == 2
    assert "leave out --balanced" in capsys.readouterr().err


def test_a_further_pruning_inherits_it(tmp_path: Path) -> None:
    line = f"prune --model resnet20 --method l1 --data synthetic:3x8x8:4:64 --balanced --device cpu --out {tmp_path}/a"
    assert main(shlex.split(f"{line} --compensate none")) == 0
    more = f"prune --from_run {tmp_path}/a --method l1 --budget flops=0.8 --compensate none --device cpu"
    assert main(shlex.split(f"{more} --out {tmp_path}/b")) == 0
    assert yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["balanced"] is True
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    del config["balanced"]
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(shlex.split(f"{more} --out {tmp_path}/c")) == 0
    assert yaml.safe_load((tmp_path / "c" / "config.yaml").read_text())["balanced"] is False
