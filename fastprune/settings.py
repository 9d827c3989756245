"""What a user may set, command by command: dataclasses whose fields become flags and the keys of ``config.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fastprune.engine import RunDirectory, TrainConfig


def setting(default: Any, text: str) -> Any:
    """A field that becomes a flag."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelSettings:
    """The network."""

    model: str = setting("", "resnet20, torchvision:NAME, timm:NAME or package.module:factory")
    weights: str | None = setting(None, "file of trained weights (.safetensors, .pt, .pth); random weights without it")
    input: str | None = setting(None, "size of one image, CxHxW; the data's or the model's usual size without it")


@dataclass
class RunSettings:
    """The run."""

    data: str | None = setting(
        None, "digits, fashion-mnist:FOLDER, cifar10:FOLDER, imagefolder:FOLDER or synthetic:CxHxW:CLASSES"
    )
    out: str | None = setting(None, "directory for the run's files; must not exist yet")
    image_size: int | None = setting(None, "side of the images, where it is to differ from the data's own")
    held_out: float | None = setting(None, "part of the training set that is held out; 10 %, at most 5000, without it")
    seed: int = setting(0, "of everything random")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


@dataclass
class NetworkSettings(ModelSettings, RunSettings):
    """A network, its data and its run."""


@dataclass
class PruneSettings(NetworkSettings):
    """Prune a trained network."""

    method: str = setting("dmc", "a method's name, see 'fastprune methods'")
    budget: str = setting("flops=0.5", "what may stay: flops=0.5, params=0.3, flops=2G, …")
    precision: str = setting("float32", "of the search: float32, or bf16 for autocast")


@dataclass
class FinetuneSettings:
    """Train the compact network of a run."""

    run: str = setting("", "directory of a pruning run")
    data: str | None = setting(None, "another data set than the run's")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    seed: int = setting(0, "of order, augmentation and dropout")


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """The recipe of a fine-tuning: as a training, with a cosine schedule from a lower learning rate."""

    lr: float = setting(0.02, "largest learning rate")
    schedule: str = setting("cosine", "shape of the learning rate: milestones or cosine")


@dataclass
class EvaluateSettings(ModelSettings):
    """Measure a run's networks, or one network with weights, on the test set."""

    run: str | None = setting(None, "directory of a run")
    data: str | None = setting(None, "data set; the run's own without it")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


T = TypeVar("T")


def pick(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass from those of ``values`` that are its fields."""
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})  # type: ignore[arg-type]


def needed(**values: Any) -> None:
    """Refuse a command that lacks an option."""
    missing = [f"--{name}" for name, value in values.items() if not value]
    if missing:
        raise ValueError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")


def resumed(settings: Mapping[str, Any], given: set[str], command: str) -> dict[str, Any]:
    """The settings that a run was begun with."""
    needed(out=settings["out"])
    extra = given - {"out", "resume", "json", "device"}
    if extra:
        raise ValueError(
            f"--resume takes its settings from {settings['out']}/config.yaml; leave out --{sorted(extra)[0]}"
        )
    config = RunDirectory.open(settings["out"]).config
    if config.get("command") != command:
        raise ValueError(f"{settings['out']!r} is a run of 'fastprune {config.get('command')}', not of '{command}'")
    return {**config, "out": settings["out"], "device": settings["device"]}


def save_config(settings: Any, command: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.yaml`` says: the settings, with files by their absolute paths."""
    values = asdict(settings)
    for name in ("out", "run"):
        values.pop(name, None)
    if values.get("weights"):
        values["weights"] = str(Path(values["weights"]).absolute())
    return {"fastprune": version("fastprune"), "command": command, **values, **extra}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with lists in place of tuples, as YAML has it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
