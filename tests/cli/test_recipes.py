"""The papers' rows as files, and runs that take their settings from one."""

from __future__ import annotations

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml

from fastprune import models, trace
from fastprune.cli.main import main
from fastprune.cli.networks import build_model, check_recipe
from fastprune.cli.recipes import read_recipe, read_training
from fastprune.cli.settings import FinetuneConfig, ModelSettings, pick
from fastprune.cli.shelf import find_recipe
from fastprune.engine import RunDirectory
from fastprune.graph.interior import gated_units
from fastprune.methods.gates.gated import GatePlacement
from fastprune.planning.budget import Budget
from fastprune.planning.fitting import fit
from fastprune.planning.limits import Limits
from fastprune.training.options import TrainConfig

FOLDER = Path(str(files("fastprune") / "recipes"))  # of the installed package
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
DATA = "synthetic:3x8x8:4:128"
SMALL = f"--model resnet20 --data {DATA} --device cpu --held_out 0.25"

# p that gives the papers' reductions, from the architectures' MACs by hand: 1 - reduction * all / those next to gates.
P = {
    "ddnp-resnet56-cifar10": 0.488,
    "ddnp-mobilenetv2-cifar10": 0.517,
    "ddnp-resnet34-imagenet": 0.541,
    "ddnp-resnet50-imagenet": 0.377,
    "ddnp-mobilenetv2-imagenet": 0.657,
    "ddnp-mobilenetv3small-imagenet": 0.696,
    "dmc-resnet56-cifar10": 0.498,
    "dmc-mobilenetv2-cifar10": 0.550,
    "dmc-resnet34-imagenet": 0.549,
    "dmc-resnet50-imagenet": 0.377,
    "dmc-resnet50-imagenet-1gate": 0.155,
    "dmc-resnet101-imagenet": 0.403,
    "dmc-mobilenetv2-imagenet": 0.465,
    "sanp-resnet56-cifar10": 0.478,
    "sanp-mobilenetv2-cifar10": 0.484,
    "sanp-resnet34-imagenet": 0.541,
    "sanp-resnet50-imagenet": 0.377,
    "sanp-mobilenetv2-imagenet": 0.661,
}
EVERYWHERE = {f"gcp-{name}-imagenet" for name in ("resnet18", "resnet50d", "resnet101d")} | {
    *(f"gcp-resnet50d-imagenet-{name}" for name in ("high", "higher", "highest")),
    "gcp-resnet101d-imagenet-low",
    *("sp-resnet56-cifar10", "sp-resnet50-imagenet", "sp-resnet50-imagenet-1g"),
    *(f"sp-mobilenet{name}" for name in ("v1-imagenet", "v1-imagenet-41m", "v2-imagenet", "v2-imagenet-43m")),
}
"""These prune all channels: their budgets are fractions of the whole network, and there is no p."""

GCP = {
    *(f"gcp-resnet18-imagenet{kind}" for kind in ("-latency", "-params")),
    *(f"gcp-resnet50d-imagenet-latency{level}" for level in ("", "-high", "-higher", "-highest")),
    *(f"gcp-resnet101d-imagenet-latency{level}" for level in ("", "-low")),
    *("gcp-resnet50-imagenet", "gcp-resnet50-imagenet-params"),
}
"""Other objectives of GCP, and tables without numbers."""

OTHERS = {
    *(f"uniform-mobilenet{name}" for name in ("v2-cifar10", "v2-imagenet", "v2-imagenet-220m", "v2-imagenet-43m")),
    *(f"uniform-mobilenet{name}-imagenet" for name in ("v1", "v3small")),
    *("uniform-mobilenetv1-imagenet-41m", "uniform-resnet50-imagenet", "uniform-resnet50-imagenet-1g"),
    *("l1-resnet56-cifar10", "l1-resnet34-imagenet"),
    *("soft-resnet56-cifar10", "soft-resnet34-imagenet", "soft-resnet50-imagenet"),
    *("hrank-resnet56-cifar10", "hrank-resnet56-cifar10-low", "hrank-resnet50-imagenet"),
    *(f"{method}-resnet{depth}-imagenet" for method in ("fpgm", "taylor") for depth in (34, 50, 101)),
    *(f"autoslim-{name}-imagenet" for name in ("mobilenetv1", "mobilenetv2", "resnet50")),
    "autoslim-resnet50-imagenet-1g",
}
"""Other methods in the papers' tables."""

NO_P = EVERYWHERE | GCP | OTHERS
TRAININGS = [name for name in RECIPES if name.startswith("train-")]
PRUNINGS = [name for name in RECIPES if name not in TRAININGS]


def path_of(name: str) -> str:
    return str(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", PRUNINGS)
def test_a_recipe_is_complete_and_right(name: str) -> None:
    recipe = read_recipe(path_of(name))
    method, architecture, dataset, *_ = name.split("-")
    assert recipe.method == method
    assert re.sub(r"_100$|[\W_]|torchvision|timm|cifar", "", recipe.settings["model"]) == architecture
    assert recipe.settings.get("image_size", 32) == (224 if dataset == "imagenet" else 32)
    # The budget is the fraction of the whole network that the paper's row leaves, or of the time.
    budget = Budget.parse(recipe.settings["budget"])
    paper = recipe.sections["paper"]
    reduction = paper.get("flops_reduction")
    if "speed_up" in paper and budget.metric == "ms":
        assert budget.value == pytest.approx(1 / paper["speed_up"], abs=6e-4)
    elif budget.metric != "params":
        assert budget.value == pytest.approx(1 - reduction / 100)
    assert ("finetune" in recipe.sections) == (method != "soft")
    check_recipe(pick(FinetuneConfig, recipe.sections.get("finetune", {})), torch.device("cpu"))
    # Every recipe is listed, with the p in its own comment.
    comment = re.search(r"gates p = ([\d.]+)$", Path(path_of(name)).read_text(encoding="utf-8"), re.MULTILINE)
    (line,) = (
        row for row in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if f"`{name}.yaml`" in row
    )
    row = [cell.strip() for cell in line.strip("|").split("|")]
    assert row[-2] == f"`{recipe.settings['budget']}`"
    if name in NO_P:
        assert (row[-1], comment) == ("–", None)
    else:
        assert comment is not None
        assert (float(row[-1]), float(comment[1])) == (P[name], P[name])
    assert row[-3] == ("–" if reduction is None else f"{reduction:g} %")
    baseline = f"{paper['baseline_top1']:.2f}" if "baseline_top1" in paper else "–"
    pruned = f"{paper['pruned_top1']:.2f}" if "pruned_top1" in paper else "–"
    assert row[3] == f"{baseline} → {pruned}"


def test_all_rows_are_there() -> None:
    assert sorted(P.keys() | NO_P) == PRUNINGS
    assert len(TRAININGS) == 10


@pytest.mark.parametrize("name", TRAININGS)
def test_the_recipe_of_a_training(name: str) -> None:
    settings = read_training(path_of(name))
    _, architecture, dataset, *_ = name.split("-")
    assert re.sub(r"[\W_]|torchvision|timm|cifar", "", settings["model"]) == architecture
    assert settings.get("image_size", 32) == (224 if dataset == "imagenet" else 32)
    check_recipe(pick(TrainConfig, settings), torch.device("cpu"))
    (line,) = (
        row for row in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if f"`{name}.yaml`" in row
    )
    row = [cell.strip() for cell in line.strip("|").split("|")]
    paper = yaml.safe_load(Path(path_of(name)).read_text(encoding="utf-8"))["paper"]
    assert row[3] == f"{paper['baseline_top1']:.2f}"
    assert row[4] == (f"{paper['baseline_top5']:.2f}" if "baseline_top5" in paper else "–")


def test_a_training_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train --recipe train-resnet56-cifar10 {SMALL} --epochs 1 --batch_size=64 --out {tmp_path}/run"
    assert main(shlex.split(line)) == 0
    config = RunDirectory.open(tmp_path / "run").config
    assert (config["model"], config["held_out"], config["epochs"], config["batch_size"]) == ("resnet20", 0.25, 1, 64)
    assert (config["lr"], config["milestones"], config["evaluate_every"]) == (0.1, [0.5, 0.75], 0)
    assert Path(config["recipe"]) == FOLDER / "train-resnet56-cifar10.yaml"
    assert main(shlex.split(f"train --resume --out {tmp_path}/run")) == 0
    capsys.readouterr()
    assert main(shlex.split(f"train --recipe dmc-resnet56-cifar10 {SMALL}")) == 2
    assert "this recipe prunes; give it to 'fastprune prune'" in capsys.readouterr().err
    assert main(shlex.split("prune --recipe train-resnet56-cifar10 --data digits")) == 2
    assert "give it to 'fastprune train'" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("model: resnet20\ntrain: {epohcs: 3}\n")
    assert main(shlex.split(f"train --recipe {tmp_path}/recipe.yaml {SMALL}")) == 2
    assert "train has no option 'epohcs' (did you mean 'epochs'?)" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("model: resnet20\n")
    assert main(shlex.split(f"train --recipe {tmp_path}/recipe.yaml {SMALL}")) == 2
    assert "'train' is missing; a recipe has model, train" in capsys.readouterr().err
    assert main(["recipes", "show", "train-resnet56-cifar10"]) == 0
    assert "# next: fastprune train --recipe train-resnet56-cifar10" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [pytest.param("uniform-mobilenetv2-cifar10", marks=pytest.mark.slow), "l1-resnet56-cifar10"]
)
def test_other_methods_reach_their_budgets(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"prune --recipe {name} --device cpu --out {tmp_path}/run --json")) == 0
    found = json.loads(capsys.readouterr().out)
    part = Budget.parse(read_recipe(path_of(name)).settings["budget"]).value
    assert part - 0.01 < found["compact"]["macs"] / found["baseline"]["macs"] <= part


# Widths and MACs of GCP's pruned networks (dmlc/gluon-cv 5677756, pruned_resnet/*.json), in the order of our layers.
RELEASED = {
    "gcp-resnet18-imagenet": (
        886_544_896,
        [8, 8, 8, 8, 8, 120, 56, 56, 128, 56, 256, 208, 208, 256, 208, 512, 512, 512, 512, 512],
    ),
    "gcp-resnet50d-imagenet-highest": (
        193_510_016,
        [
            *(
                8,
                8,
                8,
                8,
                8,
                8,
                8,
                8,
                8,
                8,
                8,
                8,
                8,
                8,
                24,
                16,
                16,
                8,
                8,
                16,
                8,
                8,
                16,
                8,
                8,
                16,
                8,
                16,
                80,
                80,
                24,
                48,
            ),
            *(80, 56, 208, 80, 120, 88, 80, 88, 64, 80, 40, 200, 80, 80, 192, 784, 784, 264, 48, 784, 152, 400, 784),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_the_released_widths_of_gcp(name: str) -> None:
    """The groups are GCP's own: its widths can be planned, and cost what its networks cost."""
    pytest.importorskip("timm")
    macs, widths = RELEASED[name]
    settings = read_recipe(path_of(name)).settings
    graph = trace(build_model(ModelSettings(settings["model"]), None).eval(), torch.zeros(1, 3, 224, 224))
    layers = [layer for layer in graph.layers if len(layer.out_units) and bool((layer.out_units >= 0).all())]
    mask = torch.zeros(graph.num_units, dtype=torch.bool)
    for layer, width in zip(layers, widths, strict=True):
        mask[layer.out_units[:width]] = True
    assert [int(mask[layer.out_units].sum()) for layer in layers] == widths
    assert float(graph.cost(mask).macs) == macs
    full = float(graph.cost().macs)
    limits = Limits(round_to=settings["round_to"], min_keep=settings["min_keep"])
    scores = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(0))
    ours = fit(graph, Budget.parse(settings["budget"]), scores, limits=limits)
    assert all(int(ours[layer.out_units].sum()) % 8 == 0 for layer in layers)
    assert float(graph.cost(ours).macs) / full == pytest.approx(macs / full, abs=0.002)


QUICK = {"resnet56"}
NETWORKS = {read_recipe(path_of(name)).settings["model"] for name in P}


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=[] if model in QUICK else pytest.mark.slow) for model in sorted(NETWORKS)]
)
def test_p_of_the_papers(model: str) -> None:
    size = 224 if model.startswith("torchvision") else 32
    with torch.device("meta"):
        network = build_model(ModelSettings(model), None)
    graph = trace(network.to_empty(device="cpu").eval(), torch.zeros(1, 3, size, size))
    for name in P:
        settings = read_recipe(path_of(name)).settings
        if settings["model"] == model:
            gates = gated_units(graph, settings[settings["method"]]["groups"])
            place = GatePlacement.build(graph, Budget.parse(settings["budget"]), gates, torch.device("cpu"))
            assert place.target == pytest.approx(P[name], abs=6e-4), name


def test_a_row_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe's values arrive in both stages, and the command line wins over them."""
    run = tmp_path / "run"
    models.save_weights(models.create("resnet20", num_classes=4), tmp_path / "w.safetensors")
    recipe = path_of("dmc-resnet56-cifar10")
    search = (
        f"--dmc.epochs 2 --dmc.samples 32 --dmc.batch_size 16 --budget flops=0.7 --weights {tmp_path}/w.safetensors"
    )
    assert main(shlex.split(f"prune --recipe {recipe} {SMALL} {search} --out {run} --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.69 < found["compact"]["macs"] / found["baseline"]["macs"] <= 0.7
    config = RunDirectory.open(run).config
    written = read_recipe(recipe)
    assert {name: config[name] for name in ("finetune", "paper")} == written.sections
    assert config["dmc"] == {**written.settings["dmc"], "epochs": 2, "samples": 32, "batch_size": 16, **UNSAID}
    assert (config["recipe"], config["budget"], config["model"], config["held_out"], config["seed"]) == (
        *(recipe, "flops=0.7", "resnet20", 0.25, 0),
    )

    assert main(shlex.split(f"finetune --run {run} --epochs 1 --batch_size=32 --device cpu --momentum 0.7")) == 0
    tuned = yaml.safe_load((run / "finetune.yaml").read_text(encoding="utf-8"))
    assert {name: tuned[name] for name in written.sections["finetune"]} == {
        **written.sections["finetune"],
        "epochs": 1,
        "batch_size": 32,
        "momentum": 0.7,
    }
    assert tuned["milestones"] == [80, 120]
    capsys.readouterr()
    # The run knows its settings; the recipe may have changed since.
    assert main(shlex.split(f"prune --resume --out {run} --recipe {recipe}")) == 2
    assert "leave out --recipe" in capsys.readouterr().err


UNSAID = {"sampling": "stochastic", "annealing": 0.0}  # options that the recipe leaves at their defaults


def test_lists_and_a_config_beside_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: resnet20\nmethod: l1\nbudget: flops=0.5\nround_to: 4\nignore: [layer1.*]\nl1: {groups: interior}\n"
        "finetune: {lr: 1e-3}\n"
    )
    (tmp_path / "config.yaml").write_text("budget: flops=0.8\n")
    line = f"prune --recipe {tmp_path}/recipe.yaml --config {tmp_path}/config.yaml --method l1 --out {tmp_path}/run"
    assert main(shlex.split(line)) == 0
    config = RunDirectory.open(tmp_path / "run").config
    assert (config["budget"], config["round_to"], config["ignore"]) == ("flops=0.8", 4, ["layer1.*"])
    assert config["l1"]["groups"] == "interior"
    assert config["finetune"] == {"lr": 0.001}
    (tmp_path / "recipe.yaml").unlink()  # the run has what it needs
    assert main(shlex.split(f"prune --resume --out {tmp_path}/run")) == 0
    assert RunDirectory.open(tmp_path / "run").config == config


WHOLE = "{model: resnet20, method: dmc, budget: flops=0.5"
BAD = [
    ("- 1", "settings by name are needed"),
    ("{a: [", "this is not YAML"),
    ("dmc: {epochs: 3}", "'model' is missing; a recipe has model, method, budget"),
    (f"{WHOLE}, bugdet: 3}}", "there is no setting 'bugdet': did you mean 'budget'?"),
    (f"{WHOLE}, 7: 3}}", "there is no setting 7: there are balanced, budget, "),
    (f"{WHOLE}, ddnp: {{epochs: 3}}}}", "there is no setting 'ddnp': "),
    (f"{WHOLE}, data: digits}}", "'data' is no part of a recipe; give it on the command line"),
    (f"{WHOLE}, seed: x}}", "seed 'x': type int is needed"),
    ("{model: resnet20, method: dmc, budget: 0.5}", "budget 0.5: type str is needed"),
    ("{model: resnet20, method: dmc, budget: half}", "budget 'half'"),
    ("{model: resnet20, method: [dmc, ddnp], budget: flops=0.5}", "method ['dmc', 'ddnp']: the name of one method"),
    ("{model: resnet20, method: dcm, budget: flops=0.5}", "no pruning method is called 'dcm'"),
    (f"{WHOLE}, dmc: {{epoch: 3}}}}", "dmc has no option 'epoch' (did you mean 'epochs'?)"),
    (f"{WHOLE}, dmc: {{epochs: 0}}}}", "dmc: epochs 0: must be at least 1"),
    (f"{WHOLE}, dmc: 3}}", "dmc 3: settings by name are needed"),
    (f"{WHOLE}, finetune: {{epohcs: 3}}}}", "finetune has no option 'epohcs' (did you mean 'epochs'?)"),
    (f"{WHOLE}, finetune: {{epochs: x}}}}", "finetune: epochs 'x': type int is needed"),
    (f"{WHOLE}, finetune: {{schedule: steep}}}}", "finetune: schedule 'steep': must be one of 'milestones', "),
    (f"{WHOLE}, finetune: [1]}}", "finetune [1]: settings by name are needed"),
    (f"{WHOLE}, paper: {{tabel: 3}}}}", "paper has no option 'tabel' (did you mean 'table'?)"),
    (f"{WHOLE}, paper: {{pruned_top1: high}}}}", "paper: pruned_top1 'high'"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_bad_recipes(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["prune", "--recipe", str(path), "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"fastprune: error: --recipe {path}: ")
    assert words in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--recipe nowhere.yaml", "--recipe nowhere.yaml: No such file or recipe"),
        ("--recipe {ddnp} --method dmc", "is for method 'ddnp', not 'dmc'; leave out --method"),
        ("--recipe {ddnp} --dmc.epochs 3", "there is no option --dmc.epochs"),
        ("--recipe {ddnp} --from_run nowhere", "has a network of its own: leave out --recipe"),
        ("--recipe {ddnp} --out new", "--data is needed"),
        (f"--recipe {{one}} {SMALL} --out new", "no residual block of this network has two gates"),
    ],
)
def test_bad_lines(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"ddnp": path_of("ddnp-resnet56-cifar10"), "one": path_of("dmc-resnet50-imagenet-1gate")}
    assert main(["prune", *shlex.split(line.format(**places))]) == 2
    assert words in capsys.readouterr().err


def test_a_run_whose_finetune_section_was_spoilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"prune --model resnet20 --data {DATA} --method l1 --budget flops=0.7 --out {tmp_path}/run"
    assert main(shlex.split(line)) == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8") + "finetune: 3\n", encoding="utf-8")
    assert main(["finetune", "--run", str(tmp_path / "run"), "--epochs", "1"]) == 2
    assert "finetune 3: settings by name are needed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddnp-resnet50-imagenet", "dmc-resnet50-imagenet-1gate"])
def test_an_imagenet_row_runs_on_a_folder_of_pictures(name: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "pictures" / part / label
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = torch.randint(0, 256, (72, 72, 3), dtype=torch.uint8, generator=generator)
                image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    weights, run = tmp_path / "w.safetensors", tmp_path / "run"
    models.save_weights(models.create("torchvision:resnet50", num_classes=2), weights)
    method = name.split("-")[0]
    smaller = f"--image_size 64 --device cpu --{method}.epochs 1 --{method}.samples 8 --{method}.batch_size 4"
    places = f"--data imagefolder:{tmp_path}/pictures --weights {weights} --out {run}"
    assert main(shlex.split(f"prune --recipe {path_of(name)} {places} {smaller}")) == 0
    assert main(shlex.split(f"finetune --run {run} --epochs 1 --batch_size 4 --device cpu")) == 0
    assert RunDirectory.open(run).config["finetune"]["milestones"] == [30, 60, 90]


@pytest.mark.parametrize(
    "name", ["dmc-resnet56-cifar10", "recipes/dmc-resnet56-cifar10.yaml", "dmc-resnet56-cifar10.yaml"]
)
def test_names_of_shipped_recipes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == FOLDER / "dmc-resnet56-cifar10.yaml"
    (tmp_path / "dmc-resnet56-cifar10.yaml").write_text("a file of one's own wins")
    assert (find_recipe("dmc-resnet56-cifar10.yaml").parent == FOLDER) is False


def test_ls_show_and_cp(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "ls", "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)) == RECIPES
    name = "gcp-resnet50d-imagenet-highest"
    assert main(["recipes", "show", name]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown) == yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert shown.splitlines()[-1].startswith(f"# next: fastprune prune --recipe {name}")
    assert main(["recipes", "cp", name]) == 0
    assert (tmp_path / f"{name}.yaml").read_bytes() == (FOLDER / f"{name}.yaml").read_bytes()
    assert main(["recipes", "cp", name]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["recipes", "show"]) == 2
    assert "give a recipe's name" in capsys.readouterr().err


def test_a_pipe_gets_whole_names(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for line in ("recipes ls", "methods"):
        assert main(line.split()) == 0
        assert "…" not in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    for line in ("recipes ls", "methods", "methods sp", "inspect --model resnet20"):
        assert main(line.split()) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, [text for text in lines if text[:1] in "│┃┏└"])) <= 60
