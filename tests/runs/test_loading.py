"""Every run that the package makes gives its networks back."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from small_networks import Plain, Split
from torch import Tensor, nn

import fastprune as fp
from fastprune import models
from fastprune.cli.main import main
from fastprune.data import load_data
from fastprune.engine import RunDirectory, RunError, TrainConfig, train
from fastprune.models import Source, source_of

DATA = "synthetic:3x8x8:4:128"


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a training ``t`` and its pruning ``p``, whose own files are then moved away."""
    folder = tmp_path_factory.mktemp("runs")
    run(f"train --model resnet20 --data {DATA} --epochs 1 --batch_size 32 --out {folder}/t")
    weights = f"{folder}/t/model.safetensors"
    run(f"prune --model resnet20 --data {DATA} --method l1 --compensate none --weights {weights} --out {folder}/p")
    return folder


def run(line: str) -> None:
    assert main(shlex.split(line)) == 0


def equal(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one.eval()(images), other.eval()(images))


def network(path: Path, classes: int = 4) -> nn.Module:
    return models.create("resnet20", num_classes=classes, weights=path).eval()


def test_a_training(runs: Path, images: Tensor) -> None:
    trained = fp.load(runs / "t")
    assert not trained.training
    assert equal(trained, network(runs / "t" / "model.safetensors"), images)
    assert equal(fp.load(runs / "t", "baseline"), trained, images)


def test_a_training_by_the_engine(tmp_path: Path, images: Tensor) -> None:
    trained, directory = Plain(), RunDirectory.create(tmp_path / "run", {})
    train(trained, load_data(DATA), TrainConfig(epochs=1, batch_size=32), run=directory, device="cpu")
    with pytest.raises(RunError, match=r"give the network that was trained, with any weights: fp\.load\(.*model=net\)"):
        fp.load(tmp_path / "run")
    assert equal(fp.load(tmp_path / "run", model=Plain()), trained, images)
    assert equal(fp.load(tmp_path / "run", "baseline", model=Plain()), trained, images)


def test_a_pruning_needs_no_file_outside_of_it(runs: Path, tmp_path: Path, images: Tensor) -> None:
    shutil.copytree(runs / "p", tmp_path / "p")
    config = tmp_path / "p" / "config.yaml"
    config.write_text(config.read_text().replace(str(runs), "/gone").replace(DATA, "cifar10:/gone"))
    baseline = fp.load(tmp_path / "p", "baseline")
    assert equal(baseline, network(runs / "t" / "model.safetensors"), images)
    plan = fp.PruningPlan.load(tmp_path / "p" / "plan.json")
    assert equal(fp.load(tmp_path / "p"), fp.apply(plan, baseline), images)


def test_a_chain_shares_the_weights_of_its_baseline(runs: Path, tmp_path: Path, images: Tensor) -> None:
    out = tmp_path / "q"
    run(f"prune --from_run {runs}/p --method l1 --compensate none --budget flops=0.6 --out {out}")
    plan = fp.PruningPlan.load(out / "plan.json")
    assert plan.macs[1] < fp.PruningPlan.load(runs / "p" / "plan.json").macs[1]
    baseline = fp.load(out, "baseline")
    assert equal(baseline, fp.load(runs / "p", "baseline"), images)
    assert equal(fp.load(out), fp.apply(plan, baseline), images)
    assert os.path.samefile(out / "baseline.safetensors", runs / "p" / "baseline.safetensors")


def test_after_fine_tuning(runs: Path, tmp_path: Path, images: Tensor) -> None:
    shutil.copytree(runs / "p", tmp_path / "p")
    before = fp.load(tmp_path / "p")
    run(f"finetune --run {tmp_path}/p --epochs 1 --batch_size 32")
    after = fp.load(tmp_path / "p")
    assert not equal(before, after, images)
    stored = models.read_weights(tmp_path / "p" / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in after.state_dict().items())


def test_trained_from_scratch_for_other_classes(
    runs: Path, tmp_path: Path, images: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "p", tmp_path / "p")
    line = f"finetune --run {tmp_path}/p --epochs 1 --batch_size 32 --from_scratch true --data synthetic:3x8x8:7:128"
    run(line)
    assert fp.load(tmp_path / "p")(images).shape == (5, 7)
    assert fp.load(tmp_path / "p", "baseline")(images).shape == (5, 4)
    capsys.readouterr()
    run(f"evaluate --run {tmp_path}/p --data synthetic:3x8x8:7:128 --json")
    printed = capsys.readouterr()
    assert set(json.loads(printed.out)) == {"compact"}
    assert "the baseline is left out: the compact network was trained for other classes" in printed.err


def test_random_weights_are_drawn_again(tmp_path: Path, images: Tensor) -> None:
    run(f"prune --model resnet20 --method l1 --input 3x8x8 --seed 3 --out {tmp_path}/r")
    assert not (tmp_path / "r" / "baseline.safetensors").exists()
    baseline = fp.load(tmp_path / "r", "baseline")
    torch.manual_seed(3)
    assert equal(baseline, models.create("resnet20"), images)
    plan = fp.PruningPlan.load(tmp_path / "r" / "plan.json")
    assert equal(fp.load(tmp_path / "r"), fp.apply(plan, baseline), images)


def test_a_run_of_an_earlier_version(runs: Path, tmp_path: Path, images: Tensor) -> None:
    shutil.copytree(runs / "p", tmp_path / "p")
    for name in ("network.json", "baseline.safetensors"):
        (tmp_path / "p" / name).unlink()
    assert equal(fp.load(tmp_path / "p"), fp.load(runs / "p"), images)
    assert equal(fp.load(tmp_path / "p", "baseline"), fp.load(runs / "p", "baseline"), images)
    shutil.copytree(runs / "t", tmp_path / "t")
    (tmp_path / "t" / "network.json").unlink()
    assert equal(fp.load(tmp_path / "t"), fp.load(runs / "t"), images)


@pytest.mark.parametrize("model", [Plain, Split])
def test_a_network_in_memory(model: type[nn.Module], tmp_path: Path, images: Tensor) -> None:
    full = model()
    result = fp.prune(full, images, method="l1", out=tmp_path / "run")
    assert isinstance(result.model, fp.RewrittenNetwork) == (model is Split)
    with pytest.raises(RunError, match=rf"its network, a {model.__name__}, cannot be built by a name.*model=net"):
        fp.load(tmp_path / "run")
    other = model().train()
    before = [tensor.clone() for tensor in other.state_dict().values()]
    assert equal(fp.load(tmp_path / "run", model=other), result.model, images)
    assert equal(fp.load(tmp_path / "run", "baseline", model=other), full, images)
    assert all(map(torch.equal, before, other.state_dict().values()))  # only its code is used
    assert other.training


def test_what_create_has_built_is_known_unless_changed(tmp_path: Path, images: Tensor) -> None:
    full = models.create("resnet20", num_classes=4)
    result = fp.prune(full, images, method="l1", out=tmp_path / "known")
    assert equal(fp.load(tmp_path / "known"), result.model, images)
    assert equal(fp.load(tmp_path / "known", "baseline"), full, images)
    full.relu = nn.SiLU()  # the same tensors, another network
    fp.prune(full, images, method="l1", out=tmp_path / "changed")
    with pytest.raises(RunError, match="cannot be built by a name"):
        fp.load(tmp_path / "changed")


def test_a_source_that_the_user_names(tmp_path: Path, images: Tensor) -> None:
    vision = pytest.importorskip("torchvision.models")
    full = vision.squeezenet1_1(num_classes=4)
    assert source_of(full) is None
    big = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"source: 'torchvision:squeezenet1_1' builds another network: classifier"):
        fp.prune(full, big, method="l1", origin=Source("torchvision:squeezenet1_1", 5))
    source = Source("torchvision:squeezenet1_1", 4)
    result = fp.prune(full, big, method="l1", out=tmp_path / "run", origin=source)
    assert equal(fp.load(tmp_path / "run"), result.model, big)


def test_steps_share_the_first_baseline(tmp_path: Path, images: Tensor) -> None:
    full = models.create("resnet20", num_classes=4)
    for result in fp.prune_in_steps(full, images, steps=2, method="l1", out=tmp_path):
        nn.init.normal_(result.model.fc.weight)
        last = result
    models.save_weights(last.model, tmp_path / "step-2" / "model.safetensors")
    assert equal(fp.load(tmp_path / "step-2", "baseline"), full, images)
    assert equal(fp.load(tmp_path / "step-2"), last.model, images)
    assert os.path.samefile(tmp_path / "step-1" / "baseline.safetensors", tmp_path / "step-2" / "baseline.safetensors")


def test_pruned_before_without_the_first_network(tmp_path: Path, images: Tensor) -> None:
    first = fp.prune(Plain(), images, method="l1")
    second = fp.prune(first.model, images, method="l1", budget="flops=0.7", after=first.plan, out=tmp_path / "run")
    assert equal(fp.load(tmp_path / "run", model=Plain()), second.model, images)
    with pytest.raises(RunError, match=r"keeps no weights of its baseline: its network had been pruned before"):
        fp.load(tmp_path / "run", "baseline", model=Plain())


def test_precision_comes_back(tmp_path: Path, images: Tensor) -> None:
    result = fp.prune(Split().double(), images.double(), method="l1", out=tmp_path / "run")
    again = fp.load(tmp_path / "run", model=Split())
    assert next(again.parameters()).dtype == torch.float64
    assert equal(again, result.model, images.double())


@pytest.mark.slow
def test_evaluate_and_report_of_a_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    import dataclasses

    from fastprune.cli import demo

    monkeypatch.setattr(demo, "BASELINE", dataclasses.replace(demo.BASELINE, epochs=2))
    monkeypatch.setattr(demo, "FINETUNE", dataclasses.replace(demo.FINETUNE, epochs=1))
    monkeypatch.setattr(demo, "SEARCH", {**demo.SEARCH, "epochs": 2})
    stages = demo.demo(demo.DemoSettings(out=str(tmp_path / "demo")))["stages"]
    assert isinstance(capsys, pytest.CaptureFixture)
    capsys.readouterr()
    run(f"evaluate --run {tmp_path}/demo --device cpu --json")
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"]["accuracy"] == pytest.approx(stages[0]["accuracy"])
    assert found["compact"]["accuracy"] == pytest.approx(stages[2]["accuracy"])
    pytest.importorskip("matplotlib")
    run(f"report --run {tmp_path}/demo")
    assert (tmp_path / "demo" / "report" / "index.html").is_file()


def test_commands_for_a_network_in_memory(images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, out = models.resnet20(num_classes=4), tmp_path / "run"  # not by create: nothing says what builds it
    fp.prune(full, images, method="l1", out=out)
    data = f"--data {DATA}"
    assert main(shlex.split(f"evaluate --run {out} {data}")) == 2
    assert "name it with --model in a command" in capsys.readouterr().err
    before = fp.load(out, model=full)
    run(f"finetune --run {out} {data} --model resnet20 --epochs 1 --batch_size 32")
    assert not equal(before, fp.load(out, model=full), images)
    capsys.readouterr()
    run(f"evaluate --run {out} {data} --model resnet20 --json")
    assert set(json.loads(capsys.readouterr().out)) == {"baseline", "compact"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "plan.json").unlink(), "holds no plan: it is no finished pruning run"),
        (lambda p: (p / "network.json").write_text("{"), r"network\.json'"),
        (lambda p: (p / "network.json").write_text("[1]"), "this is no record of a network"),
        (lambda p: (p / "network.json").write_text('{"format": "fastprune-network-1", "weights": 3}'), "weights 3 is"),
    ],
)
def test_damaged_runs(damage: object, message: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "p", tmp_path / "p")
    assert callable(damage)
    damage(tmp_path / "p")
    with pytest.raises(RunError, match=message):
        fp.load(tmp_path / "p")


def test_wrong_arguments(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which: got 'full'; give 'pruned' or 'baseline'"):
        fp.load(runs / "p", "full")  # type: ignore[arg-type]
    with pytest.raises(RunError, match="is not a run directory"):
        fp.load(tmp_path)
    with pytest.raises(fp.PlanError, match="the plan is for another model"):
        fp.load(runs / "p", model=Plain())
    RunDirectory.create(tmp_path / "begun", {"command": "train", "model": "resnet20"})
    with pytest.raises(ValueError, match="there is no such file"):
        fp.load(tmp_path / "begun")
