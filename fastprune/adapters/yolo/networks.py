"""A ``YOLO`` around a compact network, whose trainings keep the widths."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import RTDETR, YOLO

from fastprune.adapters.yolo.data import DataSet
from fastprune.engine import RunDirectory
from fastprune.models import Source
from fastprune.models.ultralytics import PREFIX, full_name, is_ultralytics, open_ultralytics
from fastprune.pruning import prune as prune_network
from fastprune.runs import NetworkRecord, load_pruned
from fastprune.runs.origin import compare


def prune(
    network: Any,
    *,
    budget: Any = "flops=0.5",
    method: str = "l1",
    data: str | Path | None = None,
    image_size: int = 640,
    batch_size: int = 16,
    workers: int = 0,
    **arguments: Any,
) -> Any:
    """Prune an Ultralytics network and return it as one: of the same class, with its names, strides and task.

    Training of the result goes on with its own widths, where Ultralytics would build the full network anew.

    Args:
        network: a ``YOLO`` of any task, as ``YOLO("yolo11n.pt")``, or an ``RTDETR``; it is not changed.
        budget: as in ``fastprune.prune``.
        method: as there; "obs" and "taylor" need ``data``, "l1" does not.
        data: the data set, as ``network.train`` takes it: a YAML file, for classification a folder. Its training part,
            without augmentation, is for scores, searches and compensation. An ``RTDETR`` takes none here, as its loss
            needs the objects of an image before it runs.
        image_size: height and width of the images; costs are counted for them.
        batch_size: images in a batch.
        workers: processes that read images.
        **arguments: further ones of ``fastprune.prune``, other than ``rewrite``, ``exact``, ``loss`` and ``forward``.

    Returns:
        A ``YOLO``; its attribute ``pruning`` is the ``PruningResult``.

    Raises:
        TypeError: if the network is none of Ultralytics', or for an argument that this function decides.
        ValueError: if the data set has another number of classes than the network; and as ``fastprune.prune``.
    """
    own = {"rewrite", "exact", *(("loss", "forward") if data is not None else ())}
    if clash := sorted(own & set(arguments)):
        raise TypeError(f"{', '.join(clash)}: this function decides it; call fastprune.prune(network.model, …) instead")
    if not isinstance(network, (YOLO, RTDETR)) or not isinstance(network.model, nn.Module):
        raise TypeError(f"network: got {type(network).__name__}; an ultralytics.YOLO with a PyTorch network is needed")
    model: Any = network.model
    if data is not None:
        classify = network.task == "classify"
        opened, objective = DataSet(data, image_size, batch_size, workers, network.overrides, classify).open(model)
        arguments |= {"data": opened, "loss": objective.loss, "forward": objective.forward}
    channels = int(model.yaml.get("channels", 3))
    example = torch.zeros(1, channels, image_size, image_size, device=next(model.parameters()).device)
    if arguments.get("out") is not None:
        arguments.setdefault("origin", find_origin(network))
    result = prune_network(model, example, method=method, budget=budget, rewrite=False, **arguments)
    small = adopt(network, result.model)
    small.pruning = result
    return small


def find_origin(network: Any) -> Source | None:
    """Return what builds a network again, by the file that it was made from; None if that has another one."""
    source = Source(full_name(f"{PREFIX}{network.model_name}"))
    return source if is_ultralytics(source.model) and not compare(source, network.model, None) else None


def load(path: str | Path) -> Any:
    """Read a pruned network as a ``YOLO``; its training keeps the widths.

    Args:
        path: the directory of a run, whose weights are read without a pickle, though the full network is built from
            the file that the run was made with; or a file of ``save`` or of a training. Ultralytics reads files of its
            kind, as ``YOLO(path)`` does: they are pickles, so read those that you trust.

    Raises:
        ValueError: for a run of another network.
    """
    if not Path(path).is_dir():
        return keep_widths(YOLO(str(path)))
    run = RunDirectory.open(path)
    source = NetworkRecord.read(run).source
    if source is None or not is_ultralytics(source.model):
        raise ValueError(
            f"{str(path)!r} is no run of a network that was named yolo:FILE; build the full network, then cut it with "
            "fastprune.apply and the run's plan"
        )
    network = open_ultralytics(source.model, source.num_classes, source.in_channels)
    return adopt(network, load_pruned(run, network.model))


def adopt(network: Any, compact: Any) -> Any:
    """Return a copy of a ``YOLO`` around the compact network of its own."""
    full: Any = network.model
    compact.requires_grad_(requires_grad=True)
    small = copy.copy(network)
    small.__dict__ = {**vars(network), "_modules": {**network._modules}, "callbacks": copy.copy(network.callbacks)}
    small.callbacks.update({event: list(functions) for event, functions in network.callbacks.items()})
    small.model, small.predictor = compact, None
    small.overrides = {**network.overrides, "pretrained": True}
    small.ckpt = {**(network.ckpt or {}), "model": compact, "ema": None, "optimizer": None, "epoch": -1}
    compact.args = full.args
    return keep_widths(small)


def keep_widths(network: Any) -> Any:
    """Let the trainings of a ``YOLO`` go on with the network that it has."""
    kind: Any = type(network)
    network.__class__ = narrow_class(kind)
    return network


class Pruned:
    """Marks the classes of ``narrow_class``."""


@functools.cache
def narrow_class(kind: type) -> type:
    """Return the class of a ``YOLO`` whose trainers take its network as it is."""
    if issubclass(kind, Pruned):
        return kind

    def train(self: Any, trainer: Any = None, **arguments: Any) -> Any:
        given = trainer or self._smart_load("trainer")  # named, as several data sets would be trained by other code
        return kind.train(self, trainer=narrow_trainer(given), **arguments)  # type: ignore[attr-defined]

    def tune(self: Any, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("tune trains networks of full width; tune the full network, then prune it")

    return type(f"Pruned{kind.__name__}", (kind, Pruned), {"train": train, "tune": tune})


@functools.cache
def narrow_trainer(kind: type) -> type:
    """Return a trainer that takes a copy of the given network, where its base builds one from a description."""

    def get_model(self: Any, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        if weights is None:
            raise ValueError("a pruned network cannot be built anew: train it with its own weights (pretrained=True)")
        classes = self.data["nc"]
        if int(weights.yaml["nc"]) != classes:
            raise ValueError(
                f"the data set has {classes} classes, the pruned network {weights.yaml['nc']}: train the full network "
                "on these data first, then prune it"
            )
        network = copy.deepcopy(weights)
        network.requires_grad_(True)
        return network

    return type(f"Pruned{kind.__name__}", (kind,), {"get_model": get_model})
