"""Networks of Ultralytics by name: ``yolo:yolo11n.pt``, ``yolo:yolo11n.yaml``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

PREFIX = "yolo:"
SUFFIXES = (".pt", ".yaml", ".yml")


def is_ultralytics(spec: str) -> bool:
    """Return whether a name is that of a network or a data set of Ultralytics, and not of a function in a package."""
    file = Path(spec.removeprefix(PREFIX)).expanduser()
    return spec.startswith(PREFIX) and (file.suffix.lower() in SUFFIXES or file.is_dir())


def full_name(spec: str) -> str:
    """Return the name of a network with the whole path of its file, if it is a file of the user."""
    file = Path(spec.removeprefix(PREFIX)).expanduser()
    return f"{PREFIX}{file.absolute()}" if file.is_file() else spec


def open_ultralytics(spec: str, num_classes: int | None = None, in_channels: int | None = None) -> Any:
    """Return the ``ultralytics.YOLO`` of a name.

    Args:
        spec: ``yolo:FILE.pt``, a network with its weights; or ``yolo:FILE.yaml``, a description, for random weights.
            Ultralytics reads the file, or fetches it if it is one of its own. A .pt file is a pickle, which can run
            any code: open only files that you trust.
        num_classes: number of classes; None = the file's own. A network with weights has its own only.
        in_channels: channels of the image; likewise.

    Raises:
        ValueError: if Ultralytics is not installed, for a file that it cannot read, or for sizes that it does not have.
    """
    name = spec.removeprefix(PREFIX)
    try:
        ultralytics: Any = importlib.import_module("ultralytics")
    except ImportError as error:
        raise ValueError(f"model {spec!r} needs Ultralytics: pip install 'fastprune[yolo]' ({error})") from error
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"model {spec!r}: give a .pt file with weights, or a .yaml file for random ones")
    try:
        network = ultralytics.YOLO(name)
        if not isinstance(network.model, nn.Module):
            raise TypeError(f"it holds a {type(network.model).__name__}, no PyTorch network")
        own: Any = network.model.yaml
        wanted = {"nc": num_classes or own["nc"], "ch": in_channels or own.get("channels", 3)}
        if wanted != {"nc": own["nc"], "ch": own.get("channels", 3)}:
            if suffix == ".pt":
                raise ValueError(
                    f"its network tells {own['nc']} classes apart, in images of {own.get('channels', 3)} channels; the "
                    f"data have {wanted['nc']} and {wanted['ch']}: first train it on these data, with Ultralytics"
                )
            settings = network.model.args
            network.model = type(network.model)(dict(own), verbose=False, **wanted)
            network.model.args, network.model.task = settings, network.task
    except Exception as error:  # Ultralytics raises what it likes
        raise ValueError(f"model {spec!r}: {' '.join(str(error).split())}") from error
    network.model.requires_grad_(requires_grad=True).float()
    return network
