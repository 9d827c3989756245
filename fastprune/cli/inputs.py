"""The inputs of a command's network, and how it runs on a batch: the example, ``--loss`` and ``--forward``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastprune.arguments import make_objective
from fastprune.cli.networks import YOLO_SIZE, image_shape, input_shape, make_example
from fastprune.cli.settings import InspectSettings, ModelSettings, ObjectiveSettings, SensitivitySettings
from fastprune.data import Data, UserData
from fastprune.engine import Placement, choose_device
from fastprune.graph.export.inputs import Example
from fastprune.graph.model_state import in_eval_mode
from fastprune.host.objects import load_object
from fastprune.models.ultralytics import is_ultralytics
from fastprune.training.example import example_of
from fastprune.training.objective import Objective


def load_objective(
    settings: ObjectiveSettings | InspectSettings | SensitivitySettings, earlier: ObjectiveSettings | None = None
) -> Objective:
    """Import the functions of ``--loss`` and ``--forward``.

    Args:
        settings: what the user names.
        earlier: the settings of an earlier run, which hold where the user names nothing.

    Raises:
        ValueError: for something else than a function of two arguments; says which is needed.
    """
    found: dict[str, Any] = {"loss": None, "forward": None}
    for name in found:
        spec = getattr(settings, name, None) or getattr(earlier, name, None)
        if spec is None:
            continue
        try:
            found[name] = make(load_object(spec, name))
            make_objective(**{"loss": None, "forward": None, name: found[name]})
        except TypeError as error:
            raise ValueError(f"--{name} {spec}: {str(error).removeprefix(f'{name}: ')}") from error
    return Objective(**found)


def make(found: Any) -> Any:
    """Return a function as it is, and an instance of a class, such as ``torch.nn:MSELoss``.

    Raises:
        TypeError: for a class that needs arguments.
    """
    if not isinstance(found, type):
        return found
    try:
        return found()
    except TypeError as error:
        raise TypeError(
            f"got the class {found.__name__}, which cannot be made without arguments ({error}); name a function"
        ) from error


def has_images(data: Data, objective: Objective) -> bool:
    """Return whether the network gets one batch of images [N, C, H, W] from the data."""
    if not isinstance(data, UserData) or data.gives_images:
        return True
    inputs, targets = data.first
    return objective.forward is None and targets is not None and isinstance(inputs, Tensor) and inputs.dim() == 4


def find_example(settings: ModelSettings, data: Data | None, objective: Objective, network: nn.Module) -> Example:
    """Return the example input of a network: a random image, or what it gets from the first batch of the data.

    Raises:
        ValueError: for ``--input`` beside data that are no images.
    """
    if data is None and settings.input is None and is_ultralytics(settings.model):
        own: Any = network
        side = 224 if own.task == "classify" else YOLO_SIZE
        return make_example((own.yaml.get("channels", 3), side, side))
    if data is None or has_images(data, objective):
        return make_example(input_shape(settings, data))
    if settings.input is not None:
        raise ValueError(f"--input {settings.input}: the first batch of --data is the example; leave --input out")
    return data_example(data, objective, network)


def data_example(data: Data, objective: Objective, network: nn.Module) -> Example:
    """Return the example input of a network for some data."""
    if isinstance(data, UserData) and not has_images(data, objective):
        return example_of(objective, network, data.first)
    return make_example(image_shape(data))


def check_batch(network: nn.Module, data: Data | None, objective: Objective, device: str) -> None:
    """Try the first batch of a user's data, before anything is written or searched.

    Raises:
        ValueError: for a batch that does not go through the network and its loss.
    """
    if not isinstance(data, UserData):
        return
    place = Placement(choose_device(device))
    inputs, targets = data.first
    try:
        with in_eval_mode(network):
            objective.check(place.model(network), place.images(inputs), place.labels(targets))
    except ValueError as error:
        raise ValueError(f"{error} (in a command, loss= is --loss and forward= is --forward)") from error
