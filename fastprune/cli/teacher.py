"""The teacher of a fine-tuning, by the value of ``--teacher``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from fastprune import models
from fastprune.cli.networks import build_code, lacks_builder
from fastprune.cli.runs import FINETUNE_CONFIG
from fastprune.data import Data
from fastprune.engine import RunDirectory, RunError
from fastprune.host.objects import names_object
from fastprune.runs import NetworkRecord, load_baseline, load_pruned

NONE, AUTO = "none", "auto"

OPTIONS = ("temperature", "distill", "distill_features")
"""The options that only a teacher gives a meaning."""

WAY_OUT = "give --teacher RUN, a run of 'fastprune train' say, or torchvision:NAME, timm:NAME or file.py:function"


def require_use(teacher: str, given: Iterable[str]) -> None:
    """Refuse options of a distillation without a teacher.

    Raises:
        ValueError: for the first of them.
    """
    idle = [name for name in OPTIONS if name in given]
    if teacher == NONE and idle:
        raise ValueError(f"--{idle[0]}: there is no teacher; give --teacher auto, or leave --{idle[0]} out")


def locate(teacher: str) -> str:
    """Return the value of ``--teacher`` with a run or a file by its absolute path, for ``--resume`` from elsewhere."""
    if is_run(teacher):
        return str(Path(teacher).absolute())
    file, _, function = teacher.rpartition(":")
    return f"{Path(file).expanduser().absolute()}:{function}" if file.endswith(".py") else teacher


def is_run(teacher: str) -> bool:
    """Return whether the value of ``--teacher`` is the directory of a run."""
    return teacher not in (NONE, AUTO) and (Path(teacher) / "config.yaml").is_file()


def load_teacher(teacher: str, run: RunDirectory, full: nn.Module | None, data: Data) -> nn.Module | None:
    """Return the teacher with its weights; None if there is none.

    Args:
        teacher: the value of ``--teacher``.
        run: the run that is fine-tuned.
        full: its full network with any weights, if the run cannot build it.
        data: the data set.

    Raises:
        ValueError: for a teacher that is not at hand, or has random weights; says what to give.
    """
    if teacher == NONE:
        return None
    if teacher == AUTO:
        return load_own(run, full, data)
    if is_run(teacher):
        return load_other(RunDirectory.open(teacher))
    if Path(teacher).exists():
        raise ValueError(f"--teacher {teacher}: this is no run, it has no config.yaml; {WAY_OUT}")
    return build_published(teacher, data)


def load_own(run: RunDirectory, full: nn.Module | None, data: Data) -> nn.Module:
    """Return the network of a run as it was before it was pruned."""
    if NetworkRecord.read(run, data).weights == "seed":
        raise ValueError(
            f"--teacher auto: the full network of {str(run.path)!r} had random weights, which teach nothing; {WAY_OUT}"
        )
    try:
        return load_baseline(run, full, data=data)
    except RunError as error:
        raise ValueError(f"--teacher auto: {error}; or {WAY_OUT}") from error


def load_other(run: RunDirectory) -> nn.Module:
    """Return the network of another run, with its newest weights."""
    trained = run.config.get("command") != "prune" or (run.path / FINETUNE_CONFIG).is_file()
    if not trained and NetworkRecord.read(run).weights == "seed":
        raise ValueError(f"--teacher {run.path}: its network has random weights, which teach nothing; {WAY_OUT}")
    if lacks_builder(run):
        raise ValueError(
            f"--teacher {run.path}: its network cannot be built by a name; in Python give "
            f"fp.finetune(..., teacher=fp.load({str(run.path)!r}, model=net)), or {WAY_OUT}"
        )
    try:
        return load_pruned(run)
    except RunError as error:
        raise ValueError(f"--teacher: {error}") from error


def build_published(name: str, data: Data) -> nn.Module:
    """Build a network that comes with its weights: a published one, or what a user's function returns."""
    if name.partition(":")[0] in ("torchvision", "timm"):
        try:
            return models.create(name, weights="pretrained")
        except ValueError as error:
            problem = str(error).partition("; fetch them")[0]  # there is no --weights here
            raise ValueError(f"--teacher {name}: {problem}; {WAY_OUT}") from error
    if not names_object(name):
        raise ValueError(f"--teacher {name}: this is neither a run nor a network with weights; {WAY_OUT}")
    return build_code(name, data)
