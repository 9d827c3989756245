"""The package in examples/ is built, installed beside ours and used, as by its author."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "fastprune-fpgm"

PRUNE = """
import torch
from fastprune import models
from fastprune.planning.budget import Budget
from fastprune.graph import trace
from fastprune.methods import Task, available, configure, load
from fastprune.surgery import apply

info = available()["my_fpgm"]
assert (info.package, info.version) == ("fastprune-fpgm", "0.1.0"), info
assert {"ranking", "p", "groups"} <= {option.name for option in info.options}, info
torch.manual_seed(0)
model = models.create("resnet20").eval()
graph = trace(model, torch.zeros(1, 3, 32, 32))
method = load("my_fpgm")
plan = method(configure(method, {"ranking": "global"})).plan(Task(model, graph, Budget.parse("flops=0.5")))
compact = apply(plan, model)
assert compact(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
print(f"kept {plan.macs[1] / plan.macs[0]:.3f}")
"""

CONTRACT = """
from fastprune.methods import load
from fastprune.testing import check_method

check_method(load("my_fpgm"))
check_method(load("my_fpgm"), ranking="global", p=1.0)
print("kept the contract")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip has installed the example."""
    pytest.importorskip("setuptools", reason="the example's build backend")
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def run(code: str, site: Path) -> str:
    """Run ``code`` in a fresh Python that sees the example beside fastprune; return its output."""
    path = [str(site), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:fastprune", "-c", code],
        capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=site,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_installed_example_prunes(site):
    kept = float(run(PRUNE, site).removeprefix("kept "))
    assert 0.49 <= kept <= 0.5


def test_installed_example_keeps_the_contract(site):
    assert "kept the contract" in run(CONTRACT, site)


def test_scores_are_the_distances_to_the_other_filters(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    from fastprune_fpgm import FPGM

    from fastprune.methods import Task
    from fastprune.planning.budget import Budget
    from fastprune.testing import network, traced

    model, graph = network(), traced()
    scores = FPGM().scores(Task(model, graph, Budget("flops", 0.5)))
    group = next(g for g in graph.groups if g.name == "block.0")
    filters = model.block[0].weight.detach().double().flatten(1)
    expected = torch.tensor([sum(float((a - b).norm()) for b in filters) for a in filters], dtype=torch.float64)
    torch.testing.assert_close(scores[group.units], expected, rtol=1e-6, atol=0)
    assert any(point.name == "my_fpgm" for point in entry_points(group="fastprune.methods"))
