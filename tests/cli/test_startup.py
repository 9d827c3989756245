"""Modules that the command line imports before it does anything. (``bench/startup.py`` measures the time.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastprune

HEAVY = {"torch", "torchvision", "numpy", "matplotlib", "timm"}
SCRIPT = """
import json, sys
from fastprune.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder with descriptions of the methods, as any earlier call leaves it."""
    folder = tmp_path_factory.mktemp("cache")
    run("methods", folder)
    return folder


def run(line: str, cache: Path) -> tuple[int, set[str], str]:
    """Return the exit code of a command, the modules that it imported, and what it printed.

    It runs in the cache folder: in a checkout it would find ./fastprune, which has no _C, before the installed package.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *line.split()], capture_output=True, text=True, check=True,
        env={**os.environ, "FASTPRUNE_CACHE": str(cache)}, cwd=cache,
    )  # fmt: skip
    *errors, last = done.stderr.splitlines()
    code, modules = json.loads(last)
    return code, set(modules), done.stdout + "\n".join(errors)


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("", 0, "commands:"),
        ("--help", 0, "Prune a trained network."),
        ("--version", 0, f"fastprune {fastprune.__version__}"),
        ("bench --help", 0, "Time the kernels beside their peers."),
        ("prun", 2, "there is no command 'prun': did you mean 'prune'?"),
        ("--verison", 2, "there is no option --verison: did you mean --version?"),
        ("prune --buget x", 2, "there is no option --buget: did you mean --budget?"),
        ("prune --dmc.epoch 3", 2, "there is no option --dmc.epoch: did you mean --dmc.epochs?"),
        ("prune --method l1 --l1.group all", 2, "did you mean --l1.groups?"),
        ("train --epohcs 3", 2, "did you mean --epochs?"),
        ("train --epochs x", 2, "--epochs x: a whole number is needed"),
        ("finetune --rnu x", 2, "did you mean --run?"),
        ("methods", 0, "│ dmc "),
        ("methods dmc", 0, "passes over the samples"),
        ("methods --json", 0, '"name": "dmc"'),
        ("prune --help", 0, "--dmc.epochs 300"),
        ("prune --method sp --help-all", 0, "--sp.workers 0"),
        ("recipes ls", 0, "dmc-resnet50-imagenet"),
        ("recipes show dmc-resnet50-imagenet", 0, "learning_rate: 0.001"),
        ("recipes show dmc-resnet50-imagent", 2, "did you mean 'dmc-resnet50-imagenet'?"),
        ("completion fish", 0, "complete --command fastprune"),
        ("inspect --help", 0, "network: resnet20, torchvision:NAME"),
    ],
)
def test_no_torch(line: str, code: int, text: str, cache: Path) -> None:
    ended, modules, printed = run(line, cache)
    assert (ended, HEAVY & modules) == (code, set())
    assert text in printed


def test_help_parses_no_other_command(cache: Path) -> None:
    _, modules, _ = run("--help", cache)
    assert {name for name in modules if name.startswith("fastprune.cli.")} == {
        f"fastprune.cli.{name}" for name in ("arguments", "commands", "help", "main", "parser", "settings")
    }


@pytest.mark.parametrize("module", ["fastprune", "fastprune.cli"])
def test_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastprune {fastprune.__version__}\n"
