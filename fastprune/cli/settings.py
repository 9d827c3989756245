"""What a user may set, command by command: dataclasses whose fields become flags and the keys of ``config.yaml``.

Nothing here imports torch, so that a mistyped flag is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastprune.options import LARGEST_SEED, POSITIONAL, POSITIONALS, SEVERAL, SWITCH, build, check, fields_of, option
from fastprune.training.options import PRECISIONS, FinetuneRecipe

NUMBERS: Mapping[str, Any] = {**SEVERAL, "type": float}
MEAN = "mean of each channel, for pixels from 0 to 1; by default that of the training images"
STD = "standard deviation of each channel, for pixels from 0 to 1"
DEVICE = "device: auto, cpu, cuda or cuda:N"
LOG = "loggers beside metrics.jsonl, with commas between them: csv, tensorboard, wandb, mlflow"
IGNORE = "names or patterns ('layer4.*.conv1') of layers that keep all of their output channels"
KEEP_CLASS = "keep the channels that the model's own code cannot do without, so that its graph is never rewritten"
LOSS = "loss(output, target) of your own, file.py:function; by default cross-entropy to class labels"
FORWARD = "forward(model, batch) that returns (output, target), file.py:function; for batches of your own"
BALANCED = "as many images of each class in the held-out part, and in other random samples of the training set"
NUM_CLASSES = "replace the classifier by a new one of this size, for other data than the weights are for (transfer)"
COMPENSATE = (
    "fit the layers that read removed channels anew on images of --data; auto = sequential where there is --data"
)
CALIBRATE = "kind of compensation; bn measures batch norms again, and alone works on a fine-tuned run too"
INEXACT = "also prune channels that norms and statistics mix; outputs then change, and the change is measured"
HEADS = "also prune whole heads of attention; the number of heads in the model's code changes"
REPLACE_NORMS = (
    "also prune channels that norms mix, exactly: the class of these norms changes, so that their statistics count the "
    "removed channels as zeros"
)


@dataclass
class ModelSettings:
    """The network."""

    model: str = option(
        "", "network: resnet20, torchvision:NAME, timm:NAME, yolo:FILE, file.py:factory, package.module:factory"
    )
    weights: str | None = option(
        None,
        "file of trained weights (safetensors or torch's), or a published name (DEFAULT); random without it",
    )
    input: str | None = option(None, "size of one image, CxHxW; by default the data's, or the model's usual size")
    ema: bool = option(False, "take the moving average of the weights (EMA) that the file holds", flag=SWITCH)


@dataclass
class ObjectiveSettings:
    """The loss, and how the network runs on a batch."""

    loss: str | None = option(None, LOSS)
    forward: str | None = option(None, FORWARD)


@dataclass
class RunSettings:
    """The run."""

    data: str | None = option(
        None,
        "data set: digits, fashion-mnist:FOLDER, cifar10:FOLDER, cifar100:FOLDER, imagefolder:FOLDER, hf:NAME, "
        "synthetic:CxHxW:CLASSES, yolo:FILE, or file.py:function that returns loaders",
    )
    out: str | None = option(
        None, "directory for the run's files, which must not exist yet; by default runs/METHOD-MODEL-N"
    )
    image_size: int | None = option(None, "side of the images in pixels; by default the data's own", minimum=1)
    held_out: float | None = option(
        None, "samples of the training set to hold out, a number or a fraction; by default 10 %, and at most 5000"
    )
    balanced: bool = option(False, BALANCED, flag=SWITCH)
    mean: tuple[float, ...] = option((), MEAN, flag=NUMBERS)
    std: tuple[float, ...] = option((), STD, flag=NUMBERS)
    seed: int = option(0, "seed of everything random", minimum=0, maximum=LARGEST_SEED)
    device: str = option("auto", DEVICE)
    log: str | None = option(None, LOG)

    def __post_init__(self) -> None:
        check(self)


@dataclass
class NetworkSettings(ModelSettings, RunSettings, ObjectiveSettings):
    """A network, its data and its run."""


@dataclass
class TrainSettings(NetworkSettings):
    """A network, its data and its run, for a training."""

    recipe: str | None = option(
        None,
        "settings of a paper's unpruned network: a name of 'fastprune recipes ls' that begins with train, or a YAML "
        "file; what is given here wins",
    )
    num_classes: int | None = option(None, NUM_CLASSES + "; without --weights, size of the output", minimum=1)


@dataclass
class InspectSettings(ModelSettings):
    """Show a network's channel groups and its cost."""

    data: str | None = option(
        None, "data set whose first batch is the example, for networks of other inputs than images"
    )
    forward: str | None = option(None, FORWARD)
    ignore: tuple[str, ...] = option((), IGNORE, flag=SEVERAL)
    keep_class: bool = option(False, KEEP_CLASS, flag=SWITCH)
    inexact: bool = option(False, INEXACT, flag=SWITCH)
    replace_norms: bool = option(False, REPLACE_NORMS, flag=SWITCH)
    heads: bool = option(False, HEADS, flag=SWITCH)


@dataclass
class MethodsSettings:
    """List methods."""

    name: str | None = option(None, "a method's name; shows all of its options", flag=POSITIONAL)


@dataclass
class PruneSettings(NetworkSettings):
    """Prune a trained network."""

    from_run: str | None = option(
        None, "prune the network of this earlier run further; budget and limits are relative to it as it is now"
    )
    recipe: str | None = option(
        None, "all settings of a paper's row: a name of 'fastprune recipes ls' or a YAML file; what is given here wins"
    )
    method: str = option("dmc", "pruning method; 'fastprune methods' lists them")
    budget: str = option("flops=0.5", "what may stay: flops=0.5, params=0.3, latency=0.6, flops=2G, latency=12ms, …")
    min_keep: int = option(1, "smallest number of units that a group may keep", minimum=1)
    round_to: int = option(
        1, "keep a multiple of this number of channels in each layer, or all of them; for example 8", minimum=1
    )
    keep_ratio: tuple[str, ...] = option(
        (), "PATTERN=LEAST:MOST, parts of these layers' channels that must and may stay ('layer1=0.5:1')", flag=SEVERAL
    )
    latency_device: str | None = option(None, "device whose latency counts; by default the run's own")
    latency_batch: int = option(1, "images in the forward pass whose latency counts", minimum=1)
    latency_dtype: str = option("float32", "precision of that forward pass", choices=("float32", "bfloat16", "float16"))
    latency_channels_last: bool = option(False, "NHWC memory layout in that forward pass", flag=SWITCH)
    latency_modelled: bool = option(
        False, "count the modelled latency alone, so that plans repeat exactly, and correct nothing", flag=SWITCH
    )
    precision: str = option("float32", "precision of the search; bf16 is autocast to bfloat16", choices=PRECISIONS)
    channels_last: bool = option(False, "NHWC memory layout in the search", flag=SWITCH)
    ignore: tuple[str, ...] = option((), IGNORE, flag=SEVERAL)
    keep_class: bool = option(False, KEEP_CLASS, flag=SWITCH)
    inexact: bool = option(False, INEXACT, flag=SWITCH)
    replace_norms: bool = option(False, REPLACE_NORMS, flag=SWITCH)
    heads: bool = option(False, HEADS, flag=SWITCH)
    compensate: str = option("auto", COMPENSATE, choices=("auto", "sequential", "one_pass", "mean", "bn", "none"))
    calibration: int = option(512, "training samples that a compensation takes", minimum=1)
    dry_run: bool = option(False, "only say what would be done, and how long it takes", flag=SWITCH)


@dataclass
class SensitivitySettings(ModelSettings):
    """A network, its data, and the parts to measure."""

    data: str | None = option(None, "data set, of which the held-out part is measured; see 'fastprune train --help'")
    out: str | None = option(None, "folder for a chart and a file of keep_ratio; without it nothing is written")
    ratios: tuple[float, ...] = option(
        (0.1, 0.25, 0.5, 0.75, 0.9), "parts of a group that stay", above=0.0, below=1.0, flag=NUMBERS
    )
    drop: float = option(
        0.01, "accuracy that a group may cost in the suggestion; 0.01 is one point, or 1 % of a loss", minimum=0.0
    )
    image_size: int | None = option(None, "side of the images in pixels; by default the data's own", minimum=1)
    held_out: float | None = option(
        None, "samples of the training set to hold out, a number or a fraction; by default 10 %, and at most 5000"
    )
    balanced: bool = option(False, BALANCED, flag=SWITCH)
    ignore: tuple[str, ...] = option((), IGNORE, flag=SEVERAL)
    loss: str | None = option(None, LOSS)
    forward: str | None = option(None, FORWARD)
    seed: int = option(0, "seed of the held-out part", minimum=0, maximum=LARGEST_SEED)
    device: str = option("auto", DEVICE)

    def __post_init__(self) -> None:
        check(self)


@dataclass
class FinetuneSettings(ObjectiveSettings):
    """Train the compact network of a run."""

    run: str = option("", "directory of a pruning run")
    data: str | None = option(None, "data set to train on in place of the run's")
    model: str | None = option(None, "full network of a run that was made with a network in memory")
    num_classes: int | None = option(None, NUM_CLASSES, minimum=1)
    device: str = option("auto", DEVICE)
    seed: int = option(0, "seed of order, augmentation and dropout", minimum=0, maximum=LARGEST_SEED)
    log: str | None = option(None, LOG)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class FinetuneConfig(FinetuneRecipe):
    """Recipe of a fine-tuning: as a training, with a cosine schedule from a lower learning rate."""

    teacher: str = option(
        "none",
        "network to learn from beside the labels: auto is the run's own before it was pruned; or another run, or the "
        "name of a network with published weights",
    )
    from_scratch: bool = option(False, "begin with random weights in place of the run's, as SP's paper does")


@dataclass
class CalibrateSettings(ObjectiveSettings):
    """Compensate a run without training."""

    run: str = option("", "directory of a pruning run; it stays as it is")
    data: str | None = option(None, "data set whose training images are taken in place of the run's")
    how: str = option("sequential", CALIBRATE, choices=("sequential", "one_pass", "mean", "bn"))
    images: int = option(512, "training samples that are taken", minimum=1)
    out: str | None = option(None, "directory of the new run, which must not exist yet; by default RUN-HOW beside RUN")
    model: str | None = option(None, "full network of a run that was made with a network in memory")
    memory: float | None = option(
        None, "GiB for values between layers, the others go to files; by default half of what is free", minimum=0.0
    )
    seed: int | None = option(None, "seed of the choice of samples; by default the run's", minimum=0)
    device: str = option("auto", DEVICE)

    def __post_init__(self) -> None:
        check(self)


@dataclass
class EvaluateSettings(ModelSettings, ObjectiveSettings):
    """Measure a run's networks, or one network with weights, on the test set."""

    run: str | None = option(None, "directory of a run")
    data: str | None = option(None, "data set to measure on; by default the run's own")
    mean: tuple[float, ...] = option((), MEAN, flag=NUMBERS)
    std: tuple[float, ...] = option((), STD, flag=NUMBERS)
    device: str = option("auto", DEVICE)


@dataclass
class ReportSettings:
    """Draw the searches and widths of pruning runs."""

    run: tuple[str, ...] | None = option(
        None, "directories of pruning runs, for one report", flag={**SEVERAL, "action": "extend"}
    )
    out: str | None = option(None, "folder for page and figures; by default RUN/report; needed for several runs")
    ranking: str | None = option(
        None, "JSON file of networks with proxies and accuracies, for a chart; without runs only this chart is drawn"
    )


@dataclass
class CompareSettings:
    """Compare pruning runs."""

    runs: tuple[str, ...] = option((), "directories of pruning runs", flag=POSITIONALS)
    chart: str = option("trade-off.svg", "file for the chart of accuracy over cost (.svg, .png or .pdf)")


@dataclass
class ExportSettings:
    """Write the network of a run as a file for other runtimes."""

    run: str | None = option(None, "directory of a run", flag=POSITIONAL)
    out: str = option(
        "",
        "the file, kept only if it computes what the network computes; by default RUN/NAME.onnx or .pt2 by --format",
    )
    format: str | None = option(None, "safetensors, pt2 or onnx; by default as the file's suffix says")
    opset: int | None = option(None, "opset of an ONNX file; by default torch's choice", minimum=1)
    batch: int | None = option(None, "fixed batch size; by default any", minimum=1)
    model: str | None = option(None, "full network of a run that was made with a network in memory")
    num_classes: int | None = option(None, "size of that network's output; by default its own", minimum=1)

    def __post_init__(self) -> None:
        check(self)


@dataclass
class DemoSettings:
    """Train, prune and fine-tune a small network."""

    out: str | None = option(None, "directory for the run's files; by default runs/demo-TIME")
    seed: int = option(0, "seed of everything random", minimum=0, maximum=LARGEST_SEED)
    device: str = option("cpu", DEVICE)

    def __post_init__(self) -> None:
        check(self)


T = TypeVar("T")


def pick(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make a settings dataclass from those of ``values`` that are its fields.

    Raises:
        ValueError: for a value of another type or out of range; a file that was edited by hand may hold anything.
    """
    try:
        return build(kind, {f.name: values[f.name] for f in fields_of(kind) if f.name in values})
    except TypeError as error:
        raise ValueError(str(error)) from error


def require(**values: Any) -> None:
    """Refuse a command that lacks an option."""
    missing = [f"--{name}" for name, value in values.items() if not value]
    if missing:
        raise ValueError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")


def read_settings(path: str, flag: str) -> dict[str, Any]:
    """Read the settings in a user's YAML file.

    Args:
        path: the file.
        flag: the flag that names the file, for messages.

    Raises:
        ValueError: for a file that cannot be read, or is not a mapping in YAML.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{flag} {path}: this is not YAML ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{flag} {path}: settings by name are needed, as in 'budget: flops=0.5'")
    return settings
