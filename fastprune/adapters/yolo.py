"""Ultralytics networks: prune a ``YOLO``, and go on with it there: ``train``, ``val``, ``predict``, ``export``.

    small = yolo.prune(YOLO("yolo11n.pt"), budget=0.5, data="coco8.yaml")
    small.train(data="coco8.yaml", epochs=10)
    small.export(format="onnx")

Ultralytics comes with the extra ``yolo`` (``pip install fastprune[yolo]``), and is under the AGPL.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastprune.pruning import prune as prune_network
from fastprune.result import PruningResult

try:
    from ultralytics import YOLO
    from ultralytics.cfg import get_cfg
    from ultralytics.data import ClassificationDataset, build_yolo_dataset
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_cls_dataset, check_det_dataset
except ImportError as error:
    raise ImportError(f"fastprune.adapters.yolo needs Ultralytics: pip install fastprune[yolo] ({error})") from error


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
        network: a ``YOLO`` of any task, as ``YOLO("yolo11n.pt")``; it is not changed.
        budget: as in ``fastprune.prune``.
        method: as there; "obs" and "taylor" need ``data``, "l1" does not.
        data: the data set, as ``network.train`` takes it: a YAML file, for classification a folder. Its training part,
            without augmentation, is for scores, searches and compensation.
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
    if not isinstance(network, YOLO) or not isinstance(network.model, nn.Module):
        raise TypeError(f"network: got {type(network).__name__}; an ultralytics.YOLO with a PyTorch network is needed")
    model: Any = network.model
    if data is not None:
        settings = settings_of(network, data=str(data), imgsz=image_size, rect=False)
        arguments |= {"data": read_batches(network, settings, batch_size, workers), "forward": run_batch}
        arguments |= {"loss": Criterion(model, settings)}
    channels = int(model.yaml.get("channels", 3))
    example = torch.zeros(1, channels, image_size, image_size, device=next(model.parameters()).device)
    result = prune_network(model, example, method=method, budget=budget, rewrite=False, **arguments)
    return adopt(network, result)


def load(path: str | Path) -> Any:
    """Read a network that was saved by ``save`` or by a training of a pruned network; its training keeps the widths.

    Ultralytics reads the file, as ``YOLO(path)`` does: a file of its kind is a pickle, so read files that you trust.
    """
    return keep_widths(YOLO(str(path)))


def adopt(network: Any, result: PruningResult) -> Any:
    """Return a copy of a ``YOLO`` around the compact network."""
    full: Any = network.model
    compact: Any = result.model
    compact.requires_grad_(requires_grad=True)
    small = copy.copy(network)
    small.__dict__ = {**vars(network), "_modules": {**network._modules}, "callbacks": copy.copy(network.callbacks)}
    small.callbacks.update({event: list(functions) for event, functions in network.callbacks.items()})
    small.model, small.predictor, small.pruning = compact, None, result
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


def settings_of(network: Any, **overrides: Any) -> Any:
    """Return the settings that Ultralytics would train a network with."""
    own = {key: value for key, value in network.overrides.items() if key not in ("model", "mode")}
    return get_cfg(overrides={**own, **overrides, "task": network.task})


def read_batches(network: Any, settings: Any, batch_size: int, workers: int) -> DataLoader[Any]:
    """Return a loader of the training images, without augmentation, with their labels for ``run_batch``.

    Raises:
        ValueError: if the data set has another number of classes than the network.
    """
    classify = network.task == "classify"
    described = check_cls_dataset(settings.data) if classify else check_det_dataset(settings.data)
    if described["nc"] != int(network.model.yaml["nc"]):
        raise ValueError(
            f"data: {settings.data!r} has {described['nc']} classes, the network {network.model.yaml['nc']}; train the "
            "network on these data first"
        )
    images: Dataset[Any]
    if classify:
        images = ClassificationDataset(str(described["train"]), settings, augment=False)
    else:
        stride = max(int(network.model.stride.max()), 32)
        images = build_yolo_dataset(settings, described["train"], batch_size, described, mode="val", stride=stride)
    return DataLoader(images, batch_size, shuffle=True, num_workers=workers, collate_fn=collect)


def collect(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack images; keep labels apart for each, as arrays, so that some images of a batch can be taken with theirs."""
    labels = [{k: v.numpy() if isinstance(v, Tensor) else v for k, v in item.items() if k != "img"} for item in items]
    return {"img": torch.stack([item["img"] for item in items]), "labels": labels}


def run_batch(model: Any, batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Run a network on a batch of ``collect``; return its predictions, and the batch as Ultralytics' losses take it."""
    images = batch["img"]
    images = images if images.is_floating_point() else images.float() / 255
    items = [
        {key: torch.as_tensor(value) if hasattr(value, "dtype") else value for key, value in labels.items()}
        for labels in batch["labels"]
    ]
    if "batch_idx" in items[0]:
        whole = YOLODataset.collate_fn([{"img": image, **item} for image, item in zip(images, items, strict=True)])
    else:
        whole = {"img": images, "cls": torch.tensor([int(item["cls"]) for item in items])}
    whole = {key: value.to(images.device) if isinstance(value, Tensor) else value for key, value in whole.items()}
    return model(images), whole


class Criterion:
    """Ultralytics' loss of a network, per image.

    Args:
        model: the full network, whose head says how predictions lie.
        settings: the weights of the parts of the loss.
    """

    def __init__(self, model: Any, settings: Any) -> None:
        self.model, self.settings = model, settings
        self.criteria: dict[torch.device, Any] = {}

    def criterion_on(self, device: torch.device) -> Any:
        """Return Ultralytics' criterion, which keeps tensors on one device."""
        if device not in self.criteria:
            model = copy.deepcopy(self.model).to(device)
            model.args = self.settings
            self.criteria[device] = model.init_criterion()
        return self.criteria[device]

    def __call__(self, predictions: Any, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean loss of a batch."""
        loss, _ = self.criterion_on(batch["img"].device)(predictions, batch)
        total: Tensor = loss.sum()
        return total if "batch_idx" not in batch else total / len(batch["img"])
