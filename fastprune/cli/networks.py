"""The networks and data of a command: built from its settings, checked against each other, measured."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import models
from fastprune.cli.settings import ModelSettings, NetworkSettings, RunSettings, require
from fastprune.data import Data, Split, UserData, load_data
from fastprune.data.load import default_workers
from fastprune.engine import Placement, RunDirectory, TrainConfig, choose_device, evaluate
from fastprune.graph import trace
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.model_state import device_of, in_eval_mode
from fastprune.host.distributed import Distributed
from fastprune.models.ultralytics import PREFIX, is_ultralytics
from fastprune.runs import NetworkRecord
from fastprune.training.data_for_network import DataForNetwork
from fastprune.training.objective import Objective, main_scores

YOLO_SIZE = 640
"""Side of the images of Ultralytics' networks without data, in pixels."""


def open_data(spec: str, settings: RunSettings) -> Data:
    """Load the data set of a run."""
    if is_ultralytics(spec):
        others = ("held_out", "balanced", "mean", "std")
        return open_yolo(spec, settings.image_size, [name for name in others if getattr(settings, name)])
    return load_data(
        spec, seed=settings.seed, held_out=settings.held_out, image_size=settings.image_size, mean=settings.mean,
        std=settings.std, balanced=settings.balanced,
    )  # fmt: skip


def open_yolo(spec: str, image_size: int | None = None, given: Sequence[str] = ()) -> Data:
    """Return a data set of Ultralytics; a network opens it.

    Args:
        spec: ``yolo:FILE.yaml``, or ``yolo:FOLDER`` for classification.
        image_size: side of the images; None = 640, for classification 224.
        given: names of options that such data do not have.

    Raises:
        ValueError: for these options, or data that cannot be found.
    """
    if given:
        raise ValueError(f"--{given[0]}: {spec!r} has its own; leave it out")
    try:
        yolo: Any = importlib.import_module("fastprune.adapters.yolo")
    except ImportError as error:
        raise ValueError(f"data {spec!r}: {error}") from error
    data: Data = yolo.DataSet(spec.removeprefix(PREFIX), image_size, workers=default_workers())
    return data


def refuse_foreign_training(data: Data, run: str | None = None) -> None:
    """Refuse to train on the data of another library, whose own trainer augments and measures them.

    Raises:
        ValueError: says what trains the network.
    """
    if isinstance(data, DataForNetwork):
        file = data.name.removeprefix(PREFIX)
        which = "YOLO('yolo11n.yaml')" if run is None else f"fastprune.adapters.yolo.load({run!r})"
        raise ValueError(f"data {data.name!r}: Ultralytics trains on them: in Python, {which}.train(data={file!r})")


def open_run_data(origin: NetworkSettings, other: str | None) -> Data:
    """Load the data set of an earlier run, or another one in its place."""
    spec = other or origin.data
    if not spec:
        raise ValueError("--data is needed: the run was made without data")
    if origin.data is None:
        origin.input = None  # the run was given a size because it had no images; these images have their own
    return open_data(spec, origin)


def input_shape(settings: ModelSettings, data: Data | None) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that the network is traced and costed with."""
    if settings.input is not None:
        sizes = settings.input.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(f"--input {settings.input!r}: write CxHxW, for example 3x224x224")
        channels, height, width = map(int, sizes)
        if data is not None and data.shape != (channels, height, width):
            raise ValueError(
                f"--input {settings.input!r}: the images of {data.name!r} are {'x'.join(map(str, data.shape))}; "
                "leave --input out, or resize the images with --image_size"
            )
        return channels, height, width
    if data is not None:
        return image_shape(data)
    if is_ultralytics(settings.model):
        return 3, YOLO_SIZE, YOLO_SIZE
    return (3, 32, 32) if settings.model in models.available() else (3, 224, 224)


def image_shape(data: Data) -> tuple[int, int, int]:
    """Return (C, H, W) of the images of a data set.

    Raises:
        ValueError: for data of another kind.
    """
    if len(data.shape) != 3:
        raise ValueError(
            f"--data {data.name}: its first input is of shape {list(data.shape)}; images [C, H, W] are needed"
        )
    channels, height, width = data.shape
    return channels, height, width


def count_data_classes(data: Data) -> int | None:
    """Return the number of classes of a data set; None for a user's loaders that do not tell it."""
    return data.num_classes if data.knows_classes else None


def make_example(shape: tuple[int, int, int]) -> Tensor:
    """Return a random batch of one image."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def build_model(settings: ModelSettings, data: Data | None, num_classes: int | None = None) -> nn.Module:
    """Build the network with its weights.

    Args:
        settings: the network.
        data: the data set, which gives the numbers of channels and classes; None = the weights give the classes.
        num_classes: size of a new classifier; None = the weights are for the data's classes.
    """
    require(model=settings.model)
    if is_ultralytics(settings.model) and data is not None and not isinstance(data, (DataForNetwork, UserData)):
        raise ValueError(f"data {data.name!r}: {settings.model!r} takes data of Ultralytics, as yolo:coco8.yaml")
    channels = 3 if data is not None and len(data.shape) != 3 else input_shape(settings, data)[0]
    if data is not None:
        classes = count_data_classes(data)
    else:
        weights = settings.weights
        classes = models.count_classes(weights) if weights is not None and not models.names_weights(weights) else None
    try:
        own, in_channels = choose_sizes(settings.model, classes, channels)
        return models.create(
            settings.model, num_classes or own, in_channels, settings.weights, ema=settings.ema,
            new_head=num_classes is not None,
        )  # fmt: skip
    except RuntimeError as error:  # torch's, where the sizes are absurd
        raise ValueError(f"model {settings.model!r} cannot be made for {channels} channels: {error}") from error


def choose_sizes(name: str, classes: int | None, channels: int) -> tuple[int | None, int | None]:
    """Return ``num_classes`` and ``in_channels`` for a network's builder; None where a user's function has no such one.

    Every builder makes networks for 3 channels; only some can be asked for another number.
    """
    asks_classes = classes is not None and models.takes(name, "num_classes")
    asks_channels = channels != 3 and models.takes(name, "in_channels")
    return classes if asks_classes else None, channels if asks_channels else None


def lacks_builder(run: RunDirectory) -> bool:
    """Return whether a run does not say what builds its network, so that a command needs ``--model``."""
    return NetworkRecord.read(run).source is None


def build_code(name: str, data: Data) -> nn.Module:
    """Build the full network of a run that does not say what builds it; its weights do not matter."""
    channels = data.shape[0] if len(data.shape) == 3 else 3
    return models.create(name, *choose_sizes(name, count_data_classes(data), channels))


def check_fit(model: nn.Module, name: str, example: Example, *, training: bool = False) -> None:
    """Refuse a network that cannot take the example, before anything is written or traced.

    Args:
        model: the network; it is not changed.
        name: what the user calls it.
        example: a batch of its inputs.
        training: whether to try it in train mode, in which auxiliary heads run too.

    Raises:
        ValueError: with the network's own words.
    """
    trial = copy.deepcopy(model).train(training)
    try:
        inputs = Inputs.from_example(example, trial)
    except TypeError as error:
        text = str(error).removeprefix("example_inputs: ").removesuffix("; give inputs by name as a dict")
        raise ValueError(
            f"model {name!r}: {text}; give --data file.py:function with batches that it takes: the first one, without "
            "its target, is the example"
        ) from error
    shapes = ["x".join(map(str, x.shape[1:])) for x in inputs.tensors]
    images = len(shapes) == 1 and inputs.tensors[0].dim() == 4
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            inputs.map(lambda x: x.to(device_of(trial))).run(trial)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # whatever the model's own code raises
        raise ValueError(
            f"model {name!r} cannot take {'images' if images else 'inputs'} of {', '.join(shapes)}: {error}; give "
            + ("images of another size (--input, --image_size) or another model" if images else
               "a batch as the network takes it, or --forward file.py:function, which calls it")
        ) from error  # fmt: skip


def check_classes(model: nn.Module, data: Data, example: Example, objective: Objective, *, more: bool = False) -> None:
    """Refuse data of other classes than a network tells apart; labels would mean something else.

    Args:
        model: the network.
        data: the data set.
        example: a batch of the network's inputs.
        objective: how the network is judged.
        more: whether the network may tell more classes apart than the data have.

    Raises:
        ValueError: with both numbers.
    """
    if not data.knows_classes or not objective.classifies:
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]), in_eval_mode(model):
        scores = Inputs.from_example(example, model).map(lambda x: x.to(device_of(model))).run(model)
    if not isinstance(data, UserData) and main_scores(scores).dim() != 2:
        raise ValueError(
            f"data {data.name!r} has a label for each image; the network gives {list(main_scores(scores).shape[1:])} "
            "numbers for one: give data of its task"
        )
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        return
    if scores.shape[1] != data.num_classes and not (more and scores.shape[1] > data.num_classes):
        owner = "" if more else "run's "
        raise ValueError(
            f"data {data.name!r} has {data.num_classes} classes, the {owner}network tells {scores.shape[1]} apart; "
            "give data of the same classes"
        )


def check_recipe(config: TrainConfig, device: torch.device) -> None:
    """Refuse a recipe that no training on this device can follow, before anything is written."""
    Placement(device, config.precision, config.channels_last)
    if config.sync_bn and device.type != "cuda":
        raise ValueError("sync_bn: torch synchronises batch statistics on CUDA only; leave it out on the CPU")


def measure(
    networks: Mapping[str, nn.Module],
    data: Data | None,
    device: str,
    peers: Distributed,
    objective: Objective | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the accuracies of each network on the test set; of a user's data without one, on the held-out part.

    These are top-1 (accuracy) and, of 10 classes or more, top-5 (top5).
    With a loss of the user's own it is the loss. Without any such part the results are empty.
    """
    aim = objective or Objective()
    splits: tuple[Split, ...] = ("test", "held_out") if isinstance(data, UserData) else ("test",)
    split = next((split for split in splits if data is not None and data.size(split)), None)
    if data is None or split is None:
        return {name: {} for name in networks}
    prefix = "" if split == "test" else "held_out_"
    placement = Placement(choose_device(device))
    found: dict[str, dict[str, Any]] = {}
    for name, network in networks.items():
        result = evaluate(placement.model(network), data, split, placement=placement, distributed=peers, objective=aim)
        keys = [key for key in ("accuracy", "top5") if key in result] if aim.classifies else ["loss"]
        found[name] = {f"{prefix}{key}": result[key] for key in keys}  # type: ignore[literal-required]
    return found


def count_size(model: nn.Module, example: Example) -> dict[str, int]:
    """Count MACs and parameters on the network itself."""
    inputs = Inputs.from_example(example, model).map(lambda x: x.to(device_of(model)))  # it was measured there
    cost = trace(model, inputs).cost()
    return {"macs": round(float(cost.macs)), "params": round(float(cost.params))}
