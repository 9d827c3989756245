"""The command line, as a demanding new user sees it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from fastprune import models
from fastprune.cli import commands, settings
from fastprune.cli.arguments import Invocation, list_options
from fastprune.cli.main import main
from fastprune.cli.parser import build_command_parser
from fastprune.engine import RunDirectory

DATA = "synthetic:3x8x8:4:128"
DMC = f"prune --model resnet20 --data {DATA} --budget flops=0.6 --device cpu --dmc.batch_size 16 --dmc.samples 96"
COMMAND = [sys.executable, "-m", "fastprune"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a training ``t``, its pruning ``p``, and wrong files; tests copy what they change."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(shlex.split(f"train --model resnet20 --data {DATA} --epochs 1 --batch_size 32 --out {folder}/t")) == 0
    weights = f"--weights {folder}/t/model.safetensors"
    assert main(shlex.split(f"prune --model resnet20 --data {DATA} --method l1 {weights} --out {folder}/p")) == 0
    models.save_weights(models.create("resnet20", num_classes=7), folder / "seven.safetensors")
    torch.save({"a": object()}, folder / "object.pt")
    (folder / "file").write_text("not a folder")
    for name, text in {
        "unknown": "metod: dmc",
        "nope": "dmc: {nope: 3}",
        "type": "budget: [1]",
        "list": "- 1",
        "broken": "{a: [",
        "methods": "method: [1]",
        "number": "dmc: 3",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    for name, file, content in (
        ("badplan", "plan.json", b'{"format": 3'),
        ("listplan", "plan.json", b"[]"),
        ("cut", "model.safetensors", (folder / "p" / "model.safetensors").read_bytes()[:5000]),
        ("badyaml", "config.yaml", b"{a: ["),
        ("listyaml", "config.yaml", b"- 1"),
        ("typeyaml", "config.yaml", (folder / "p" / "config.yaml").read_bytes().replace(b"seed: 0", b"seed: x")),
        ("noweights", "config.yaml", (folder / "p" / "config.yaml").read_bytes().replace(b"t/model", b"gone/model")),
        ("empty", "model.safetensors", None),
    ):
        shutil.copytree(folder / "p", folder / name)
        if content is None:
            (folder / name / file).unlink()
        else:
            (folder / name / file).write_bytes(content)
    for file in ("network.json", "baseline.safetensors"):  # as in a run of an earlier version
        (folder / "noweights" / file).unlink()
    return folder


@pytest.fixture
def here(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(runs)
    return runs


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {
        str(path.relative_to(folder)): b"" for path in folder.rglob("*") if path.is_dir()
    }


TRAIN = f"train --model resnet20 --data {DATA} --epochs 1"
L1 = "prune --model resnet20 --method l1 --out new/run"

BAD = [
    # The parser's complaints, in a user's words.
    ("nonsense", "there is no command 'nonsense': give one of train, methods, "),
    ("prun --model resnet20", "there is no command 'prun': did you mean 'prune'?"),
    ("--nope", "there is no option --nope"),
    (f"{TRAIN} --out new --epohcs 3", "there is no option --epohcs: did you mean --epochs?"),
    (f"{TRAIN} --out new --batch-sizes 3", "there is no option --batch-sizes: did you mean --batch_size?"),
    (f"{TRAIN} --out new --epochs x", "--epochs x: a whole number is needed"),
    (f"{TRAIN} --out new --lr nan", "--lr nan: a finite number is needed"),
    (f"{TRAIN} --out new --milestones 0.5", r"--milestones 0.5: a list such as \[0.5,0.75\] is needed"),
    (f"{TRAIN} --out new --nesterov maybe", "--nesterov maybe: true or false is needed"),
    (f"{L1} --metho l1", "there is no option --metho: did you mean --method?"),
    # train
    ("train", "--model and --data are needed"),
    (f"train --model resnet21 --data {DATA} --out new", r"model 'resnet21' is unknown \(did you mean resnet"),
    ("train --model resnet20 --data digitz --out new", r"'digitz' is unknown \(did you mean digits\?\); give one of"),
    ("train --model resnet20 --data cifar10:/nowhere --out new", "'/nowhere' is no folder"),
    (f"train --model resnet20 --data {DATA} --out t", "exists already: continue that run with --resume"),
    (f"{TRAIN} --out file/new", "cannot make the run directory"),
    (f"{TRAIN} --out new --epochs -1", "epochs -1: must be at least 0"),
    (f"{TRAIN} --out new --batch_size 0", "batch_size 0: must be at least 1"),
    (f"{TRAIN} --out new --momentum -1", "momentum -1.0: must be at least 0 and below 1"),
    (f"{TRAIN} --out new --nesterov true --momentum 0", "nesterov: it needs optimizer 'sgd' and a momentum above 0"),
    (f"{TRAIN} --out new --gamma 0", "gamma 0.0: must be above 0"),
    (f"{TRAIN} --out new --milestones [-1]", "milestones -1.0: must be at least 0"),
    (f"{TRAIN} --out new --precision fp16", "--precision fp16: one of 'float32', 'bf16' is needed"),
    (f"{TRAIN} --out new --sync_bn true --device cpu", "sync_bn: .* leave it out on the CPU"),
    (f"{TRAIN} --out new --seed -1", "seed -1: must be at least 0 and at most 9223372036854775807"),
    (f"{TRAIN} --out new --seed 99999999999999999999", "seed 99999999999999999999: must be at least 0 and at most 9"),
    (f"{TRAIN} --out new --image_size 0", "image_size 0: must be at least 1"),
    (f"{TRAIN} --out new --held_out 1.5", "held_out 1.5: give"),
    (f"{TRAIN} --out new --device gpu", "device 'gpu': give auto, cpu, cuda or cuda:N"),
    (f"{TRAIN} --out new --input 1x8x8", "--input '1x8x8': the images of .* are 3x8x8"),
    (f"{TRAIN} --out new --weights nowhere.pth", "weights 'nowhere.pth': there is no such file"),
    (f"{TRAIN} --out new --weights object.pt", "never unpickled"),
    (f"{TRAIN} --out new --weights seven.safetensors", r"do not fit ResNet: .*fc.weight \[7, 64\], needs \[4, 64\]"),
    ("train --model torchvision:resnet18 --data digits --out new", "takes images of 3 channels, not 1"),
    (f"train --model torchvision:alexnet --data {DATA} --out new", "cannot take images of 3x8x8: .*too small"),
    ("train --resume --out nowhere", "'nowhere' is not a run directory"),
    ("train --resume --out p", "'p' is a run of 'fastprune prune', not of 'train'"),
    ("train --resume --out t --epochs 3", "--resume takes its settings from t/config.yaml; leave out --epochs"),
    # inspect, methods, demo
    ("inspect", "--model is needed"),
    ("inspect --model resnet20 --input 3x0x5", "--input '3x0x5': write CxHxW"),
    ("inspect --model torchvision:alexnet --input 3x20x20", "cannot take images of 3x20x20"),
    ("inspect --model resnet20 --input 99999999x3x3", "model 'resnet20' cannot be made for 99999999 channels"),
    ("methods extra", "no pruning method is called 'extra': there are "),
    ("methods dmc extra", "unrecognized arguments: extra"),
    ("demo --out p", "'p' exists already: give another --out"),
    ("demo --out new --seed -3", "seed -3: must be at least 0"),
    # bench
    ("bench", "bench needs one more word: give one of bench kernels, bench step, bench search, bench latency, "),
    ("bench stap", "there is no command 'bench stap': did you mean 'bench step'?"),
    ("bench kernels --only nope", "only 'nope': must be one of 'gates', 'group_prox', "),
    ("bench kernels --onyl topk_mask", "there is no option --onyl: did you mean --only?"),
    ("bench kernels --device gpu", "device 'gpu': give auto, cpu, cuda or cuda:N"),
    ("bench kernels --json nowhere/file", "json 'nowhere/file': there is no such folder"),
    ("bench kernels --seconds 0", "seconds 0.0: must be above 0"),
    ("bench step --compile_seconds 0", "compile_seconds 0.0: must be above 0"),
    ("bench step --only topk_mask", "must be one of 'ResNet-50', 'ResNet-56'"),
    ("bench search --only l1", "only 'l1': must be one of 'dmc', 'ddnp'"),
    # prune: the method, its options, the budget
    ("prune --model resnet20 --out new --method dmcc", "no pruning method is called 'dmcc': did you mean 'dmc'"),
    ("prune --model resnet20 --out new", "--data is needed: method 'dmc' searches on training data"),
    ("prune --model resnet20 --method l1 --compensate bn --dry_run", "--data is needed: --compensate bn fits layers"),
    (f"{L1} --dmc.epochs 3", "there is no option --dmc.epochs: the method is 'l1'; --method dmc has"),
    (f"{DMC} --out new --dmc.nope 3", "there is no option --dmc.nope"),
    (f"{DMC} --out new --dmc.epoch 3", "there is no option --dmc.epoch: did you mean --dmc.epochs?"),
    (f"{DMC} --out new --dmc.epochs x", "--dmc.epochs x: a whole number is needed"),
    (f"{DMC} --out new --dmc.epochs 0", "epochs 0: must be at least 1"),
    (f"{DMC} --out new --dmc.sampling dice", "--dmc.sampling dice: one of 'stochastic', 'deterministic' is needed"),
    (f"{DMC} --out new --dmc 3", "--dmc 3: a YAML file with options of 'dmc' is needed"),
    (f"{L1} --budget half", "budget 'half': 'flops=…', 'params=…' or 'latency=…' is needed"),
    (f"{L1} --budget flops=1.5", r"the fraction to keep must be in \(0, 1\]"),
    (f"{L1} --budget flops=2G", "so there is nothing to prune"),
    (f"{L1} --budget flops=0.001", "with every prunable channel gone 0.011 remains"),
    (f"{L1} --keep_ratio '*=1:1'", "with every prunable channel gone 1.000 remains"),
    (f"{L1} --keep_ratio layer9=0:1", "no layer has such a name"),
    (f"{L1} --keep_ratio layer1", "write PATTERN=LEAST:MOST"),
    (f"{L1} --round_to 0", "round_to 0"),
    (f"{L1} --budget latency=12", r"a unit \(12ms\)"),
    (f"{L1} --latency_dtype int8", "one of 'float32', 'bfloat16', 'float16' is needed"),
    (f"prune --model resnet20 --method l1 --data {DATA} --weights seven.safetensors --out new", "do not fit ResNet"),
    ("prune --model resnet20 --method l1 --out p", "exists already"),
    # prune: YAML, resume
    ("prune --config nowhere.yaml", "--config nowhere.yaml: No such file or directory"),
    ("prune --config unknown.yaml", "there is no option --metod: did you mean --method?"),
    ("prune --config nope.yaml", "there is no option --dmc.nope"),
    ("prune --config type.yaml", r"--budget \[1\]: a text is needed"),
    ("prune --config list.yaml", "--config list.yaml: settings by name are needed"),
    ("prune --config broken.yaml", "--config broken.yaml: this is not YAML"),
    ("prune --config seven.safetensors", "--config seven.safetensors: this is not YAML"),
    ("prune --config methods.yaml", r"method \[1\]: the name of one method is needed"),
    ("prune --config number.yaml", "dmc 3: options by name are needed"),
    ("prune --resume", "--out is needed"),
    ("prune --resume --out t", "'t' is a run of 'fastprune train', not of 'prune'"),
    ("prune --resume --out p --budget flops=0.3", "leave out --budget"),
    ("prune --resume --out p --l1.groups interior", "leave out --l1.groups"),
    ("prune --resume --out badyaml", "config.yaml' is not YAML"),
    ("prune --resume --out listyaml", "holds no mapping"),
    ("prune --resume --out typeyaml", "seed 'x': type int is needed"),
    ("prune --resume --out noweights", "gone/model.safetensors': there is no such file"),
    # finetune
    ("finetune", "--run is needed"),
    ("finetune --run t", "'t' holds no plan: it is no finished pruning run"),
    ("finetune --run badplan", "badplan/plan.json: not a pruning plan"),
    ("finetune --run listplan", "listplan/plan.json: not a pruning plan"),
    ("finetune --run cut", "not a whole safetensors file"),
    ("finetune --run empty", "there is no such file"),
    ("finetune --run typeyaml", "seed 'x': type int is needed"),
    ("finetune --run p --precision fp16", "--precision fp16: one of"),
    ("finetune --run p --momentum -1", "momentum -1.0"),
    ("finetune --run p --data synthetic:3x8x8:9:128", "has 9 classes, the run's network tells 4 apart"),
    ("finetune --run p --resume", "p/finetune.yaml; there is none, so there is nothing to resume"),
    ("finetune --run p --resume --epochs 3", "leave out --epochs"),
    # evaluate
    ("evaluate", "--model and --data are needed"),
    ("evaluate --run nowhere", "'nowhere' is not a run directory"),
    ("evaluate --run empty", "there is no such file"),
    ("evaluate --run cut", "not a whole safetensors file"),
    ("evaluate --run badplan", "not a pruning plan"),
    ("evaluate --run noweights", "gone/model.safetensors': there is no such file"),
    ("evaluate --run p --model resnet20", "--run p has a network of its own: leave out --model"),
    ("evaluate --run p --data synthetic:3x8x8:9:128", "has 9 classes, the run's network tells 4 apart"),
    (f"evaluate --model torchvision:alexnet --data {DATA}", "cannot take images of 3x8x8"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_input(line: str, message: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(here)
    assert main(shlex.split(line)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (last,) = [text for text in err.splitlines() if not text.startswith("warning: no --weights")]
    assert last.startswith("fastprune: error: ")
    assert re.search(message, last), err
    assert contents(here) == before


def test_inspect_of_resnet50(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model", "torchvision:resnet50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["macs"], found["params"], found["units"], len(found["groups"])) == (4089184256, 25557032, 11456, 37)
    assert sum(group["size"] for group in found["groups"]) == 11456
    assert len(found["layers"]) == 54
    assert found["layers"][0]["groups"] == ["conv1"]
    assert [layer["layer"] for layer in found["layers"] if layer["kept"]] == ["fc"]


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    found = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert {"dmc", "l1", "l2", "random", "uniform"} <= found.keys()
    assert found["dmc"]["package"] == "fastprune"
    assert "CVPR 2020" in found["dmc"]["paper"]
    options = {option["name"]: option for option in found["dmc"]["options"]}
    assert options["epochs"]["default"] == 300
    assert options["epochs"]["type"] == "int"
    assert options["epochs"]["help"]


def test_inspect_has_whole_names_where_there_is_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", "timm:convnext_atto", "--input", "3x32x32"]) == 0
    out = capsys.readouterr().out
    assert out.count("│ stages.2.blocks.5.mlp.fc1 │ stages.2.blocks.5.mlp.fc1 │") == 1
    assert main(["inspect", "resnet20"]) == 0
    assert "stream: channels that pass residual additions" in capsys.readouterr().out


def test_papers_are_shorter_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns, papers in (
        ("80", ("Gao 2020", "Gao 2022", "Zhang")),
        ("120", ("Gao et al., CVPR 2020", "Zhang and Ou")),
    ):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["methods"]) == 0
        out = capsys.readouterr().out
        assert all(f"│ {paper} " in out for paper in papers)


@pytest.mark.parametrize(
    "line",
    [
        "methods",
        "doctor",
        pytest.param("inspect --model mobilenetv2-cifar", marks=pytest.mark.slow),
        "evaluate --run p",
    ],
)
def test_tables_fit_80_columns(
    line: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(shlex.split(line)) == 0
    lines = [text for text in capsys.readouterr().out.splitlines() if not text.startswith("next: ")]
    assert len(lines) > 4
    assert max(map(len, lines)) <= 80


def test_every_flag_has_its_own_help() -> None:
    for command in commands.COMMANDS:
        method = "dmc" if commands.COMMANDS[command].takes_method else None
        invocation = Invocation(command, method)
        parser = build_command_parser(command, invocation)
        actions = [action for action in parser._actions if action.option_strings]
        assert len(actions) >= 2
        for action in actions:
            assert action.help, f"{command} {action.option_strings}"
        # The names that are told apart before there is a parser are the parser's.
        known = [name.removeprefix("--") for name in parser._option_string_actions if name.startswith("--")]
        assert sorted(list_options(invocation)) == sorted(known)


def test_prune_evaluate_and_finetune(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    line = f"prune --model resnet20 --data {DATA} --weights t/model.safetensors --method l2 --out {run} --json"
    assert main(shlex.split(line)) == 0
    pruned = json.loads(capsys.readouterr().out)
    # The printed numbers are those on disk, and those that the compact network itself measures.
    plan = json.loads((run / "plan.json").read_text())
    assert pruned["compact"]["macs"] == plan["macs"]["planned"] <= 0.5 * plan["macs"]["full"]
    assert pruned["baseline"]["params"] == plan["params"]["full"] == 269332
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {name: pruned[name] for name in ("baseline", "compact")}

    assert main(shlex.split(f"finetune --run {run} --epochs 1 --batch_size 32 --json")) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["baseline"] == pruned["baseline"]
    assert evaluated["compact"] == {**pruned["compact"], "accuracy": tuned["compact"]["accuracy"]}
    weights = models.read_weights(run / "model.safetensors")
    counted = sum(t.numel() for name, t in weights.items() if "running" not in name and "num_batches" not in name)
    assert counted == evaluated["compact"]["params"]

    # A resumed search would replace the fine-tuned weights by those before the fine-tuning.
    before = contents(run)
    assert main(shlex.split(f"prune --resume --out {run}")) == 2
    assert "have been fine-tuned since: go on with fastprune finetune" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.slow
def test_without_data_there_is_no_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    line = f"prune --model resnet20 --method uniform --input 3x16x16 --out {run} --json"
    assert main(shlex.split(line)) == 0
    pruned = json.loads(capsys.readouterr().out)
    assert pruned["baseline"] == {"macs": 10138240, "params": 269722}
    # The run names no data, so it may be measured on images of another size than that of --input.
    assert main(shlex.split(f"evaluate --run {run} --data synthetic:3x8x8:10:128 --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["compact"]["accuracy"] <= 1
    assert found["baseline"]["macs"] == 2535040  # 8x8: the convolutions' quarter, and the linear layer


def test_a_file_with_options_of_the_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "options.yaml").write_text("{epochs: 1, samples: 32}")
    line = f"{DMC.partition(' --dmc')[0]} --dmc {tmp_path}/options.yaml --dmc.samples 16 --out {tmp_path}/run"
    assert main(shlex.split(line)) == 0
    options = RunDirectory.open(tmp_path / "run").config["dmc"]
    assert (options["epochs"], options["samples"], options["batch_size"]) == (1, 16, 256)


def test_flags_win_over_a_yaml_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: resnet20\nmethod: l1\nbudget: flops=0.3\nround_to: 4\nl1: {groups: interior}\n"
    )
    line = f"prune --config {tmp_path}/recipe.yaml --budget flops=0.6 --channels_last --out {tmp_path}/run --json"
    assert main(shlex.split(line)) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.55 < found["compact"]["macs"] / found["baseline"]["macs"] <= 0.6
    config = RunDirectory.open(tmp_path / "run").config
    assert (config["method"], config["budget"], config["round_to"], config["l1"]["groups"]) == (
        "l1",
        "flops=0.6",
        4,
        "interior",
    )
    assert config["channels_last"]


def test_settings_from_a_file_are_checked() -> None:
    with pytest.raises(ValueError, match="seed 'x': type int is needed"):
        settings.pick(settings.NetworkSettings, {"seed": "x"})
    chosen = settings.pick(settings.FinetuneConfig, {"milestones": [1, 2], "lr": 1, "other": 3})
    assert (chosen.milestones, chosen.lr) == ((1.0, 2.0), 1.0)


# --- stopped and resumed --------------------------------------------------------------------------------------------

SLOW_STEPS = """
import sys, time
from fastprune.cli.main import main
from fastprune.engine import loop
from fastprune.engine.meter import Meter

add = Meter.add
def slow(self, metrics):  # so that a signal finds the run in the middle
    add(self, metrics)
    time.sleep(0.05)
Meter.add = slow
sys.exit(main(sys.argv[1:]))
"""


def stopped(line: str, folder: Path, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Run a command with slow steps, and stop it with a signal once it has a checkpoint after step 0."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STEPS, *shlex.split(line)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not any(int(path.stem[5:]) > 0 for path in folder.glob("step-*.safetensors")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(line, process.returncode, out, err)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the same runs as below, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(shlex.split(f"{DMC} --dmc.epochs 4 --out {folder}/p")) == 0
    return folder


def same_files(one: Path, other: Path) -> None:
    for name in ("plan.json", "model.safetensors"):
        if (one / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_interrupted_prune_resumes_to_the_same_bytes(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "p"
    ended = stopped(f"{DMC} --dmc.epochs 4 --out {run}", run / "checkpoints" / "search", signal.SIGTERM)
    assert ended.returncode == 130
    assert ended.stdout == ""
    told = re.search(
        r"(?m)^fastprune: search was interrupted at step \d+; resume it from .*: fastprune (.*)\n", ended.stderr
    )
    assert told, ended.stderr
    assert not (run / "plan.json").exists()
    assert main(shlex.split(told[1])) == 0  # the command that it told
    capsys.readouterr()
    same_files(whole / "p", run)
    logged = [record["step"] for record in RunDirectory.open(run).metrics() if record["stage"] == "search"]
    assert logged == sorted(set(logged))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "train",
        "prune",
        "prune ddnp",
        "prune ddnp release",
        "prune dp",
        "prune sanp",
        "prune gcp",
        "prune sp",
        "finetune",
    ],
)
def test_every_command_resumes_after_every_signal(
    command: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = "--epochs 3 --batch_size 16 --device cpu"
    common, _, _ = DMC.partition(" --dmc")
    ddnp = DMC.replace("dmc", "ddnp") + " --method ddnp --ddnp.epochs 4 --out {}"
    sp = "--sp.adaptor trained --sp.batch_size 16 --sp.population 4 --sp.iterations 2 --sp.levels 3 --sp.images 12"
    lines = {
        "prune ddnp": ddnp,
        "prune ddnp release": f"{ddnp} --ddnp.variant release",
        "prune dp": DMC.replace("dmc", "dp") + " --method dp --dp.epochs 4 --out {}",
        "prune sanp": f"{common} --method sanp --sanp.batch_size 16 --sanp.epochs 4 --sanp.every 2 --out {{}}",
        "prune gcp": f"{common} --method gcp --gcp.batch_size 16 --gcp.rounds 2 --out {{}}",
        "prune sp": f"{common} --method sp --sp.epochs 2 {sp} --out {{}}",
        "train": f"train --model resnet20 --data {DATA} {recipe} --out {{}}",
        "prune": f"{DMC} --dmc.epochs 4 --out {{}}",
        "finetune": f"finetune {recipe} --run {{}}",
    }
    verb = command.split()[0]
    stage, place = {
        "train": ("training", "--out"),
        "prune": ("search", "--out"),
        "finetune": ("finetune", "--run"),
    }[verb]
    runs = {name: tmp_path / name for name in ("undisturbed", "SIGINT", "SIGKILL")}
    if command == "finetune":
        for run in runs.values():
            shutil.copytree(whole / "p", run)
    assert main(shlex.split(lines[command].format(runs["undisturbed"]))) == 0
    for number in (signal.SIGINT, signal.SIGKILL):
        run = runs[number.name]
        ended = stopped(lines[command].format(run), run / "checkpoints" / stage, number)
        assert ended.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
        capsys.readouterr()
        assert main([verb, place, str(run), "--resume", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["run"] == str(run)
        assert (run / "model.safetensors").exists()
        same_files(runs["undisturbed"], run)


def test_a_run_killed_before_its_first_checkpoint_resumes(whole: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint, a run is its config.yaml alone."""
    run = tmp_path / "p"
    run.mkdir()
    shutil.copy(whole / "p" / "config.yaml", run)
    assert main(shlex.split(f"prune --resume --out {run}")) == 0
    same_files(whole / "p", run)


def test_a_run_of_an_earlier_version_resumes_without_compensation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"prune --model resnet20 --data synthetic:3x8x8:4:64 --method l1 --device cpu --out {tmp_path}"
    assert main(shlex.split(f"{line}/new")) == 0
    assert "compensated without training (sequential): " in capsys.readouterr().out
    old = RunDirectory.open(tmp_path / "new").config
    old = {name: value for name, value in old.items() if name not in ("compensate", "calibration")}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(old))
    assert main(shlex.split(f"prune --resume --out {tmp_path}/old")) == 0
    assert "compensated" not in capsys.readouterr().out


# --- as a process, and as several -----------------------------------------------------------------------------------


def test_as_a_process(tmp_path: Path) -> None:
    bad = subprocess.run(
        [*COMMAND, "inspect", "--model", "resnet2"], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("fastprune: error: model 'resnet2' is unknown")


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    line = f"{shlex.join([*COMMAND, 'methods', '--json'])} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")  # 0: written before the reader left


@pytest.mark.slow
def test_two_processes_make_one_plan(tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    line = shlex.split(f"{DMC} --dmc.epochs 2 --out {run} --json")
    done = subprocess.run(
        [*torchrun, "-m", "fastprune", *line], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    (printed,) = done.stdout.splitlines()
    plan = json.loads((run / "plan.json").read_text())
    assert json.loads(printed)["compact"]["macs"] == plan["macs"]["planned"]
    assert "destroy_process_group" not in done.stderr
    records = RunDirectory.open(run).metrics()
    assert [record["stage"] for record in records].count("plan") == 1
    assert [record["stage"] for record in records].count("result") == 1
