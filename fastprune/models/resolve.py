"""Networks by name: our own, ``torchvision:…``, ``timm:…`` and ``package.module:factory``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.host.spelling import did_you_mean
from fastprune.models.mobilenet import mobilenetv2
from fastprune.models.resnet import resnet20, resnet32, resnet56, resnet110
from fastprune.models.weights import load_weights

_suggestion = partial(did_you_mean, form=" ({})", most=3, show=str)

MARK = "_fastprune_source"
"""Attribute of a network with the arguments of ``create``: a plain tuple, so that pickles need no class of ours."""

OWN: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "mobilenetv2-cifar": mobilenetv2,
}


def available() -> list[str]:
    """Return the names of this package's own networks."""
    return list(OWN)


def create(
    spec: str, num_classes: int | None = None, in_channels: int | None = None, weights: str | Path | None = None
) -> nn.Module:
    """Build a network, without any download.

    Args:
        spec: one of ``available()``, such as ``resnet56``; ``torchvision:resnet50``, ``timm:efficientnet_b0``; or
            ``package.module:factory`` for your own function or class that returns a ``torch.nn.Module``.
        num_classes: size of the output; None = the factory's default.
        in_channels: channels of the image; None = the factory's default. torchvision's networks take 3 only.
        weights: a file for ``load_weights``; None = random initialisation.

    Returns:
        The network on the CPU, in train mode, like any new torch module.

    Raises:
        ValueError: for an unknown name, a package that is not installed, an argument that the factory does not take, or
            weights that do not fit.

    >>> create("resnet20", num_classes=100).fc.out_features
    100
    """
    source, colon, name = spec.partition(":")
    if not colon:
        if spec not in OWN:
            raise ValueError(
                f"model {spec!r} is unknown{_suggestion(spec, OWN)}; this package has {', '.join(OWN)}; for another "
                "network give 'torchvision:NAME', 'timm:NAME' or 'package.module:factory'"
            )
        model = _call(spec, OWN[spec], num_classes=num_classes, in_channels=in_channels)
    elif source == "torchvision":
        model = _create_from_torchvision(name, num_classes, in_channels)
    elif source == "timm":
        model = _create_from_timm(name, num_classes, in_channels)
    else:
        model = _create_by_factory(source, name, num_classes, in_channels)
    if weights is not None:
        load_weights(model, weights)
    vars(model)[MARK] = (spec, num_classes, in_channels)
    return model


def _create_from_torchvision(name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    models = _import_vision("torchvision.models", f"torchvision:{name}")
    names = models.list_models(module=models)
    if name not in names:
        raise ValueError(f"model 'torchvision:{name}' is unknown{_suggestion(name, names)}")
    if in_channels not in (None, 3):
        raise ValueError(f"model 'torchvision:{name}' takes images of 3 channels, not {in_channels}")
    arguments: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = True  # given, as torchvision warns that the default will change
    return _call(f"torchvision:{name}", lambda **given: models.get_model(name, **given), **arguments)


def _create_from_timm(name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    timm = _import_vision("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise ValueError(f"model 'timm:{name}' is unknown{_suggestion(name, timm.list_models())}")
    return _call(
        f"timm:{name}",
        lambda **given: timm.create_model(name, pretrained=False, **given),
        num_classes=num_classes,
        in_chans=in_channels,
    )


def _create_by_factory(module: str, name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    spec = f"{module}:{name}"
    try:
        container = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"model {spec!r}: cannot import {module!r} ({error})") from error
    factory = getattr(container, name, None)
    if not callable(factory):
        raise ValueError(f"model {spec!r}: {module!r} has no function {name!r}{_suggestion(name, dir(container))}")
    return _call(spec, factory, num_classes=num_classes, in_channels=in_channels)


def _call(spec: str, factory: Callable[..., Any], **arguments: Any) -> nn.Module:
    """Call ``factory`` with the arguments that were given; check these and the result."""
    given = {key: value for key, value in arguments.items() if value is not None or key == "weights"}
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        raise ValueError(f"model {spec!r} does not take {sorted(given)}: {error}") from error
    try:
        model = factory(**given)
    except TypeError as error:
        raise ValueError(f"model {spec!r} cannot be built with {given}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _import_vision(package: str, spec: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"model {spec!r} needs {package.partition('.')[0]}: pip install 'fastprune[vision]' ({error})"
        ) from error
