"""What a user may set, command by command: dataclasses whose fields become flags and the keys of ``config.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from fastprune.engine import RunDirectory, TrainConfig
from fastprune.options import convert
from fastprune.planning.budget import Conditions
from fastprune.planning.limits import Limits

LARGEST_SEED = 2**63 - 1  # what torch's generators take


def setting(default: Any, text: str, **flag: Any) -> Any:
    """A field that becomes a flag; ``flag`` are what argparse is told of one that is no ``--name VALUE``."""
    return field(default=default, metadata={"help": text, "flag": flag})


def check_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not take."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed {seed}: give a whole number from 0 to {LARGEST_SEED}")


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

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size {self.image_size}: at least 1 pixel is needed")


@dataclass
class NetworkSettings(ModelSettings, RunSettings):
    """A network, its data and its run."""


IGNORE = "names or patterns ('layer4.*.conv1') of layers whose output channels stay"
KEEP_CLASS = "keep the channels that the model's own code cannot do without, so that its graph is never rewritten"

INEXACT = "let channels leave norms and statistics over channels; the compact network then differs, by what is measured"


@dataclass
class InspectSettings(ModelSettings):
    """Show a network's channel groups and its cost."""

    ignore: tuple[str, ...] = setting((), IGNORE, nargs="+")
    keep_class: bool = setting(False, KEEP_CLASS, action="store_true")
    inexact: bool = setting(False, INEXACT, action="store_true")


@dataclass
class PruneSettings(NetworkSettings):
    """Prune a trained network."""

    from_run: str | None = setting(
        None, "prune the network of an earlier run further, as it is now; budget and limits are relative to it"
    )
    recipe: str | None = setting(
        None, "YAML file with all settings of a paper's row, see recipes/; what is given here wins over it"
    )
    method: str = setting("dmc", "a method's name, see 'fastprune methods'")
    budget: str = setting("flops=0.5", "what may stay: flops=0.5, params=0.3, latency=0.6, flops=2G, latency=12ms, …")
    min_keep: int = setting(1, "units that stay at least in each group")
    round_to: int = setting(1, "what the channels that stay in a layer are a multiple of (or all of them); 8, say")
    keep_ratio: tuple[str, ...] = setting(
        (), "PATTERN=LEAST:MOST, parts of these layers' channels that must and may stay ('layer1=0.5:1')", nargs="+"
    )
    latency_device: str | None = setting(None, "device whose latency counts; the run's own without it")
    latency_batch: int = setting(1, "images in the forward pass whose latency counts")
    latency_dtype: str = setting("float32", "its precision: float32, bfloat16 or float16")
    latency_channels_last: bool = setting(False, "its memory layout is NHWC", action="store_true")
    precision: str = setting("float32", "of the search: float32, or bf16 for autocast")
    channels_last: bool = setting(False, "the search's memory layout is NHWC", action="store_true")
    ignore: tuple[str, ...] = setting((), IGNORE, nargs="+")
    keep_class: bool = setting(False, KEEP_CLASS, action="store_true")
    inexact: bool = setting(False, INEXACT, action="store_true")

    @property
    def limits(self) -> Limits:
        """Of the widths."""
        return Limits.parse(self.keep_ratio, min_keep=self.min_keep, round_to=self.round_to)

    @property
    def conditions(self) -> Conditions:
        """Under which a latency counts."""
        dtype: Any = self.latency_dtype
        return Conditions(self.latency_device, self.latency_batch, dtype, self.latency_channels_last)


@dataclass
class FinetuneSettings:
    """Train the compact network of a run."""

    run: str = setting("", "directory of a pruning run")
    data: str | None = setting(None, "another data set than the run's")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    seed: int = setting(0, "of order, augmentation and dropout")

    def __post_init__(self) -> None:
        check_seed(self.seed)


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """The recipe of a fine-tuning: as a training, with a cosine schedule from a lower learning rate."""

    lr: float = setting(0.02, "largest learning rate")
    schedule: str = setting("cosine", "shape of the learning rate: milestones or cosine")
    from_scratch: bool = setting(False, "begin with random weights in place of the run's, as SP's paper does")


@dataclass
class EvaluateSettings(ModelSettings):
    """Measure a run's networks, or one network with weights, on the test set."""

    run: str | None = setting(None, "directory of a run")
    data: str | None = setting(None, "data set; the run's own without it")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


@dataclass
class ReportSettings:
    """Draw the searches and widths of pruning runs."""

    run: tuple[str, ...] | None = setting(
        None, "directories of pruning runs; several are drawn together", nargs="+", action="extend"
    )
    out: str | None = setting(None, "folder for page and figures; RUN/report without it; needed for several runs")


T = TypeVar("T")


def pick(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass from those of ``values`` that are its fields.

    Raises:
        ValueError: for a value of another type or out of range; a file that was edited by hand may hold anything.
    """
    types = get_type_hints(kind)
    chosen = {f.name: values[f.name] for f in fields(kind) if f.name in values}  # type: ignore[arg-type]
    try:
        return kind(**{name: convert(value, types[name], f"{name} {value!r}") for name, value in chosen.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error


def read_settings(path: str, flag: str) -> dict[str, Any]:
    """The settings in a YAML file of the user's, which ``flag`` names."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{flag} {path}: this is not YAML ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{flag} {path}: settings by name are needed, as in 'budget: flops=0.5'")
    return settings


def needed(**values: Any) -> None:
    """Refuse a command that lacks an option."""
    missing = [f"--{name}" for name, value in values.items() if not value]
    if missing:
        raise ValueError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")


def resumed(settings: Mapping[str, Any], given: set[str], command: str) -> dict[str, Any]:
    """The settings that a run was begun with; only its place and its device can be told anew."""
    needed(out=settings["out"])
    run = RunDirectory.open(settings["out"])
    only_resumed(given, "out", run.path / "config.yaml")
    if run.config.get("command") != command:
        raise ValueError(f"{settings['out']!r} is a run of 'fastprune {run.config.get('command')}', not of '{command}'")
    anew = {name: settings[name] for name in ("out", "resume", "json", *({"device"} & given))}
    return {**run.config, **anew}


def only_resumed(given: set[str], place: str, file: Path) -> None:
    """Refuse options beside ``--resume`` that ``file`` has already."""
    extra = sorted(given - {place, "resume", "json", "device"})
    if extra:
        raise ValueError(f"--resume takes its settings from {file}; leave out --{extra[0]}")


def save_config(settings: Any, command: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.yaml`` says: the settings, with files by their absolute paths."""
    values = asdict(settings)
    for name in ("out", "run"):
        values.pop(name, None)
    for name in ("weights", "from_run", "recipe"):
        if values.get(name):
            values[name] = str(Path(values[name]).absolute())
    return {"fastprune": version("fastprune"), "command": command, **values, **extra}
