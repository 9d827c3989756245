"""Networks by name: our own, ``torchvision:…``, ``timm:…``, ``yolo:…``, ``package.module:factory``, ``file.py:…``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.host.objects import load_object
from fastprune.host.spelling import did_you_mean
from fastprune.models.heads import find_head, load_body, transplant
from fastprune.models.mobilenet import mobilenetv2
from fastprune.models.pretrained import fetching, find_torchvision_weights, names_weights, refuse_named
from fastprune.models.resnet import resnet20, resnet32, resnet56, resnet110
from fastprune.models.ultralytics import full_name, is_ultralytics, open_ultralytics
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
    spec: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    weights: str | Path | None = None,
    *,
    ema: bool = False,
    new_head: bool | None = None,
) -> nn.Module:
    """Build a network; only weights by name are ever fetched, if they are not in the cache.

    Args:
        spec: one of ``available()``, such as ``resnet56``; ``torchvision:resnet50``, ``timm:efficientnet_b0``;
            ``yolo:FILE.pt`` or ``yolo:FILE.yaml`` for the network of an ``ultralytics.YOLO``, the first with its
            weights (a pickle: open only files that you trust); or ``package.module:factory`` or ``file.py:factory`` for
            your own function or class that returns a ``torch.nn.Module``.
        num_classes: size of the output; None = the factory's default. Beside weights for other classes the network gets
            a new classifier, with random weights, for a training on other data (transfer).
        in_channels: channels of the image; None = the factory's default. torchvision's networks take 3 only.
        weights: a file for ``load_weights``; for networks of torchvision and timm also the name of published weights:
            ``DEFAULT``, ``IMAGENET1K_V2``, ``pretrained``, …; None = random initialisation.
        ema: whether a file's moving average of the weights is taken.
        new_head: whether the classifier is new: True, also if the weights are for as many classes; False, never, so
            weights for other classes are refused; None = if they are for other classes.

    Returns:
        The network on the CPU, in train mode, like any new torch module.

    Raises:
        ValueError: for an unknown name, a package that is not installed, an argument that the factory does not take,
            weights that do not fit, or cannot be fetched, or a network without a classifier that could be new.

    >>> create("resnet20", num_classes=100).fc.out_features
    100
    """
    source, colon, name = ("yolo", ":", "") if is_ultralytics(spec) else spec.rpartition(":")
    if new_head and num_classes is None:
        raise ValueError("new_head: a new classifier needs a size; give num_classes")
    named = str(weights) if weights is not None and names_weights(weights) else None
    if not colon:
        if spec not in OWN:
            raise ValueError(
                f"model {spec!r} is unknown{_elsewhere(spec) or _suggestion(spec, OWN)}; this package has "
                f"{', '.join(OWN)}; for another network give 'torchvision:NAME', 'timm:NAME', 'yolo:FILE', "
                "'package.module:factory' or 'file.py:factory'"
            )
        if named is not None:
            refuse_named(spec, named)
        model = _call(spec, OWN[spec], num_classes=num_classes, in_channels=in_channels)
    elif source == "torchvision":
        model = _create_from_torchvision(name, num_classes, in_channels, named, new_head)
    elif source == "timm":
        model = _create_from_timm(name, num_classes, in_channels, named, new_head)
    elif source == "yolo":
        if named is not None:
            refuse_named(spec, named)
        if new_head:
            raise ValueError(
                f"num_classes: {spec!r} gets a new head in a training by Ultralytics; train it there first"
            )
        model = open_ultralytics(spec, num_classes, in_channels).model.train()
    else:
        if named is not None:
            refuse_named(spec, named)
        model = _create_by_factory(spec, num_classes, in_channels)
    if weights is not None and named is None:
        if num_classes is None or new_head is False or source == "yolo":
            load_weights(model, weights, ema=ema)
        else:
            find = partial(find_head, spec, lambda n: create(spec, n, in_channels), num_classes)
            load_body(model, weights, find, ema=ema, always=bool(new_head))
    file, _, function = spec.rpartition(":")
    place = f"{Path(file).expanduser().absolute()}:{function}" if file.endswith(".py") else full_name(spec)
    vars(model)[MARK] = (place, num_classes, in_channels)
    return model


def takes(spec: str, argument: str) -> bool:
    """Return whether what builds a network can be asked for a size; a user's function need not have the argument.

    Args:
        spec: as for ``create``.
        argument: "num_classes" or "in_channels".

    Raises:
        ValueError: for a function that cannot be imported.
    """
    source, colon, _ = spec.rpartition(":")
    if not colon or source in ("torchvision", "timm") or is_ultralytics(spec):
        return True
    factory = load_object(spec, "model")
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of functions in C, which have none
        return True
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _elsewhere(name: str) -> str:
    """Return the suggestion of a network of that name in an installed package; "" if there is none."""
    found = []
    for package, known in (("torchvision", _knows_torchvision), ("timm", _knows_timm)):
        try:
            found += [f"{package}:{name}"] if known(name) else []
        except ImportError:
            continue
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _knows_torchvision(name: str) -> bool:
    models: Any = importlib.import_module("torchvision.models")
    return name in models.list_models(module=models)


def _knows_timm(name: str) -> bool:
    return bool(importlib.import_module("timm").is_model(name))


def _create_from_torchvision(
    name: str, num_classes: int | None, in_channels: int | None, weights: str | None, new_head: bool | None
) -> nn.Module:
    spec = f"torchvision:{name}"
    models = _import_vision("torchvision.models", spec)
    names = models.list_models(module=models)
    if name not in names:
        raise ValueError(f"model {spec!r} is unknown{_suggestion(name, names)}")
    if in_channels not in (None, 3):
        raise ValueError(f"model {spec!r} takes images of 3 channels, not {in_channels}")
    if weights is not None:
        chosen = find_torchvision_weights(models, name, weights)
        classes = len(chosen.meta["categories"])
        misfit = num_classes not in (None, classes)
        if misfit and new_head is False:
            raise ValueError(
                f"weights {weights!r} of {spec!r} are for {classes} classes, not {num_classes}; first train a network "
                "with a new classifier (fastprune train --num_classes), then give the file of its weights"
            )
        with fetching(spec, weights):
            model = _call(spec, lambda: models.get_model(name, weights=chosen))
        if num_classes is not None and (misfit or new_head):
            donor = create(spec, num_classes)
            transplant(model, donor, find_head(spec, lambda n: create(spec, n), num_classes))
        return model
    arguments: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = True  # given, as torchvision warns that the default will change
    return _call(spec, lambda **given: models.get_model(name, **given), **arguments)


def _create_from_timm(
    name: str, num_classes: int | None, in_channels: int | None, weights: str | None, new_head: bool | None
) -> nn.Module:
    timm = _import_vision("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise ValueError(f"model 'timm:{name}' is unknown{_suggestion(name, timm.list_models())}")
    if weights not in (None, "DEFAULT", "pretrained"):
        raise ValueError(
            f"weights {weights!r} of 'timm:{name}': timm names them within the model, as in "
            "'timm:resnet50.a1_in1k'; give pretrained"
        )

    def make(**given: Any) -> Any:
        if weights is None:
            return timm.create_model(name, pretrained=False, **given)
        with fetching(f"timm:{name}", weights):
            return timm.create_model(name, pretrained=True, **given)

    model: Any = _call(f"timm:{name}", make, num_classes=num_classes, in_chans=in_channels)
    if new_head and weights is not None:  # timm makes one only for another number of classes
        find_head(f"timm:{name}", lambda n: create(f"timm:{name}", n, in_channels), int(num_classes or 0))
        model.reset_classifier(num_classes)
    return model  # type: ignore[no-any-return]


def _create_by_factory(spec: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    factory = load_object(spec, "model")
    if isinstance(factory, nn.Module):
        raise ValueError(f"model {spec!r} is a network already; name a function that returns it")
    if not callable(factory):
        raise ValueError(f"model {spec!r} is a {type(factory).__name__}; name a function that returns the network")
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
