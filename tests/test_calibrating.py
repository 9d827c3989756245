"""``fastprune.calibrate``: a run that exists gets the weights that ``prune(compensate=…)`` would have given it."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import PlainCNN
from torch import Tensor, nn

import fastprune as fp
from fastprune.cli.main import main
from fastprune.engine import RunDirectory, RunError
from fastprune.graph.plan import PlanError, PruningPlan
from fastprune.recovery import plan_in
from fastprune.runs import Origin

EXAMPLE = torch.zeros(2, 3, 16, 16)
DATA = "synthetic:3x8x8:4:128"


def loader(count: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(16, 3, 16, 16, generator=generator) for _ in range(count)]
    return [(F.avg_pool2d(x, 5, 1, 2) * 5, torch.arange(16) % 4) for x in noise]


@pytest.fixture
def net(randomised: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomised(PlainCNN()).eval()


def prune(net: nn.Module, out: Path, **arguments: Any) -> fp.PruningResult:
    chosen = {"method": "l1", "budget": "flops=0.5", "compensate": "none", **arguments}
    return fp.prune(net, EXAMPLE, data=loader(), out=out, **chosen)


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["sequential", "one_pass", "mean", "bn"])
def test_the_weights_are_those_of_a_pruning_that_compensates(net: nn.Module, tmp_path: Path, how: Any) -> None:
    prune(net, tmp_path / "raw")
    before = content(tmp_path / "raw")
    wanted = prune(net, tmp_path / "wanted", compensate=how, calibration=48)
    result = fp.calibrate(tmp_path / "raw", loader(), how, images=48, out=tmp_path / "new", model=net)
    assert equal(result.model, wanted.model)
    assert result.metrics["compensation"] == wanted.metrics["compensation"]
    assert content(tmp_path / "raw") == before
    new = RunDirectory.open(tmp_path / "new")
    assert equal(fp.load(new.path, model=net), wanted.model)
    assert equal(fp.load(new.path, "baseline", model=net), net)
    section = {"run": str(tmp_path / "raw"), "how": how, "images": 48, "seed": 0, "data": None}
    assert new.config == {**RunDirectory.open(tmp_path / "raw").config, "calibrate": section}
    assert new.metrics()[-1]["compensation"]["how"] == how
    again = fp.calibrate(new.path, loader(), how, images=48, model=net)  # from the full weights again
    assert equal(again.model, wanted.model)


def test_weights_that_a_search_trained_come_from_its_checkpoint(net: nn.Module, tmp_path: Path) -> None:
    options = {"method": "slimming", "epochs": 2, "batch_size": 16, "lr": 0.05, "evaluate_every": 0}
    prune(net, tmp_path / "raw", **options)
    wanted = prune(net, tmp_path / "wanted", compensate="one_pass", **options)
    result = fp.calibrate(tmp_path / "raw", loader(), "one_pass", model=net, out=tmp_path / "new")
    assert equal(result.model, wanted.model)
    assert equal(fp.load(tmp_path / "new", "baseline", model=net), net)
    with pytest.raises(RunError, match=rf"'slimming' trains the weights, .*; calibrate '{tmp_path}/raw', .*--how bn"):
        fp.calibrate(tmp_path / "new", loader(), model=net)
    shutil.rmtree(tmp_path / "raw" / "checkpoints")
    with pytest.raises(RunError, match="'slimming' trains the weights, and checkpoints/search, which had them"):
        fp.calibrate(tmp_path / "raw", loader(), model=net)
    assert fp.calibrate(tmp_path / "raw", loader(), "bn", model=net).metrics["compensation"]["how"] == "bn"


class Shuffled(nn.Module):
    """A network with batch norms whose compact form is a rewritten graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.later = nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.relu(self.norm(self.first(x))).split([4, 12], 1)
        x = torch.relu(self.later(self.second(torch.cat([right, left], 1))))
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [PlainCNN, pytest.param(Shuffled, marks=pytest.mark.slow)])
def test_of_a_fine_tuned_run_batch_norms_alone_are_measured(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    tuned = prune(net, tmp_path / "run", budget="flops=0.6")
    assert isinstance(tuned.model, fp.RewrittenNetwork) == (kind is Shuffled)
    fp.finetune(tuned, loader(), epochs=2, lr=0.2, out=tmp_path / "tuned")
    shutil.copyfile(tmp_path / "tuned" / "model.safetensors", tmp_path / "run" / "model.safetensors")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write((tmp_path / "tuned" / "metrics.jsonl").read_text())
    for run in ("run", "tuned"):
        with pytest.raises(RunError, match=r"fine-tun.*; calibrate with how='bn' \(--how bn\), or prune again"):
            fp.calibrate(tmp_path / run, loader(), model=net)
        result = fp.calibrate(tmp_path / run, loader(), "bn", model=net, out=tmp_path / f"{run}-bn")
        trained, measured = tuned.model.state_dict(), result.model.state_dict()
        changed = {name for name, tensor in measured.items() if not torch.equal(tensor, trained[name])}
        norms = ("norm", "later") if kind is Shuffled else ("features.1", "features.5", "features.9")
        assert changed == {f"{norm}.running_{part}" for norm in norms for part in ("mean", "var")}
        assert result.metrics["difference"] < 1e-5  # compact and masked network, with the trained weights
        first, weights = next(iter(norms)), trained
        x = torch.cat([images for images, _ in loader()])
        name = "first" if kind is Shuffled else "features.0"
        y = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)
        torch.testing.assert_close(measured[f"{first}.running_mean"], y.mean((0, 2, 3)))
    assert equal(fp.load(tmp_path / "run-bn", model=net), result.model)


def test_plans_of_other_graphs(net: nn.Module, tmp_path: Path) -> None:
    one = prune(net, tmp_path / "one", ignore=["features.4"], budget="flops=0.8")
    source = Origin.of_run(RunDirectory.open(tmp_path / "one"))
    two = fp.prune(
        one.model, EXAMPLE, method="l1", budget="flops=0.8", after=one.plan, origin=source, out=tmp_path / "two"
    )
    graph = fp.trace(net, EXAMPLE)
    assert len(one.plan.mask) < len(two.plan.mask)  # the second plan adds the group that the first one ignored
    for plan in (one.plan, two.plan):
        own = plan_in(graph, plan)
        assert own.macs == plan.macs
        assert {**plan.layers, **own.layers} == own.layers
    chained = fp.calibrate(tmp_path / "two", loader(), model=net)
    assert chained.plan.macs == two.plan.macs
    assert chained.metrics["compensation"]["fitted"] == 3
    result = fp.calibrate(tmp_path / "one", loader(), model=net)
    assert result.metrics["compensation"]["fitted"] == 3
    other = fp.trace(net, EXAMPLE, ignore=["features.0"])
    with pytest.raises(PlanError, match=r"removes channels of 'features\.0\.weight' that this graph keeps"):
        plan_in(other, one.plan)


def test_what_is_refused(net: nn.Module, tmp_path: Path) -> None:
    prune(net, tmp_path / "run")
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"cannot be built by a name; give the full network"):
        fp.calibrate(run, loader())
    with pytest.raises(ValueError, match="how: got 'none'; choose sequential"):
        fp.calibrate(run, loader(), "none", model=net)
    with pytest.raises(ValueError, match="compensate: got 'exact'"):
        fp.calibrate(run, loader(), "exact", model=net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory: got -1"):
        fp.calibrate(run, loader(), model=net, memory=-1, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match=r"exists already"):
        fp.calibrate(run, loader(), model=net, out=run)
    (run / "baseline.safetensors").unlink()
    with pytest.raises(RunError, match=r"keeps no weights of its baseline: .*; calibrate with how='bn'"):
        fp.calibrate(run, loader(), model=net)
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    prune(bare.eval(), tmp_path / "bare")
    with pytest.raises(ValueError, match="has no batch norm with running statistics"):
        fp.calibrate(tmp_path / "bare", loader(), "bn", model=bare)
    (tmp_path / "bare" / "plan.json").unlink()
    with pytest.raises(RunError, match="holds no plan"):
        fp.calibrate(tmp_path / "bare", loader(), model=bare)


def run(line: str, code: int = 0) -> None:
    assert main(shlex.split(line)) == code


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"train --model resnet20 --data {DATA} --epochs 1 --batch_size 32 --out t")
    run(f"prune --model resnet20 --data {DATA} --method l1 --weights t/model.safetensors --out runs/p")
    run(f"prune --model resnet20 --data {DATA} --method l1 --weights t/model.safetensors --compensate mean --out w")
    capsys.readouterr()
    run("calibrate runs/p --how mean")
    printed = capsys.readouterr().out.splitlines()
    assert "run directory: runs/p-mean" in printed
    assert printed[-1] == "next: fastprune finetune --run runs/p-mean"
    assert equal(fp.load("runs/p-mean"), fp.load("w"))
    run("calibrate --run runs/p --how mean --json --images 64")
    assert '"before"' in capsys.readouterr().out
    assert Path("runs/p-mean-2/model.safetensors").is_file()
    for line in ("evaluate", "report", "export --format pt2", "finetune --epochs 1 --batch_size 32", "report"):
        name, _, rest = line.partition(" ")
        run(f"{name} runs/p-mean {rest}")
    run("compare runs/p runs/p-mean")
    run("calibrate runs/p-mean --how bn --out runs/tuned")
    assert capsys.readouterr().out.splitlines()[-1] == "next: fastprune report --run runs/tuned"
    run("report runs/tuned")
    page = Path("runs/tuned/report/index.html").read_text(encoding="utf-8")
    places = [page.index(f"fastprune {text}") for text in (
        "prune --model resnet20", "calibrate runs/p --how mean --out runs/p-mean",
        "finetune --run runs/p-mean", "calibrate runs/p-mean --how bn --out runs/tuned",
    )]  # fmt: skip
    assert places == sorted(places)
    run("calibrate runs/p-mean", 2)
    assert "it has been fine-tuned since the cut" in capsys.readouterr().err
    run("prune --resume --out runs/p-mean", 2)
    assert "was made by fastprune calibrate: give the run that it came from" in capsys.readouterr().err
    run("calibrate t", 2)
    assert "holds no plan: it is a training; calibrate a pruning run" in capsys.readouterr().err


class Torn:
    """A loader that fails when it is read in earnest."""

    def __init__(self, whole: int) -> None:
        self.whole, self.times = whole, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.times += 1
        if self.times > self.whole:
            raise KeyError("a broken file")
        return iter(loader())


def out_of_memory(*arguments: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_compensation_that_fails_leaves_the_uncompensated_run(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raw = prune(net, tmp_path / "raw")
    monkeypatch.setattr("fastprune.job.compensate_weights", out_of_memory)
    with caplog.at_level(logging.WARNING):
        result = prune(net, tmp_path / "run", compensate="one_pass")
        prune(net, None, compensate="one_pass")  # type: ignore[arg-type]
    again = [
        f"fastprune calibrate {tmp_path}/run --how one_pass",
        "fp.compensate(model, result.plan, data, 'one_pass')",
    ]
    assert [record.getMessage() for record in caplog.records if record.name == "fastprune.job"] == [
        "compensation failed, so the weights are as they were cut (OutOfMemoryError: CUDA out of memory); "
        f"try again: {command}"
        for command in again
    ]
    assert equal(result.model, raw.model)
    assert equal(fp.load(tmp_path / "run", model=net), raw.model)
    failed = {"how": "one_pass", "failed": "OutOfMemoryError: CUDA out of memory"}
    assert RunDirectory.open(tmp_path / "run").metrics()[-1]["compensation"] == failed
    monkeypatch.undo()
    wanted = prune(net, tmp_path / "wanted", compensate="one_pass")
    assert equal(fp.calibrate(tmp_path / "run", loader(), "one_pass", model=net).model, wanted.model)


def test_data_that_fail_after_the_search(net: nn.Module, tmp_path: Path) -> None:
    seen = Torn(100)
    fp.prune(net, EXAMPLE, method="l1", data=seen, compensate="bn")
    torn = Torn(seen.times - 1)
    result = fp.prune(net, EXAMPLE, method="l1", data=torn, compensate="bn", out=tmp_path / "run")
    assert result.metrics["compensation"]["failed"] == "KeyError: 'a broken file'"
    assert equal(fp.load(tmp_path / "run", model=net), result.model)


def test_a_process_that_is_killed_while_it_compensates_has_saved_its_plan(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastprune.job.compensate_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(net, tmp_path / "run", compensate="one_pass")
    monkeypatch.undo()
    wanted = prune(net, tmp_path / "wanted", compensate="one_pass")
    assert torch.equal(PruningPlan.load(tmp_path / "run" / "plan.json").mask, wanted.plan.mask)
    result = fp.calibrate(tmp_path / "run", loader(), "one_pass", model=net, out=tmp_path / "new")
    assert equal(result.model, wanted.model)
    assert result.metrics["macs"] == wanted.metrics["macs"]


def test_the_command_says_how_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastprune.job.compensate_weights", out_of_memory)
    run(f"prune --model resnet20 --data {DATA} --method l1 --compensate mean --out p")
    printed = capsys.readouterr()
    assert "fastprune: compensation failed, so the weights are as they were cut" in printed.err
    assert printed.out.splitlines()[-1] == "next: fastprune calibrate p --how mean"
