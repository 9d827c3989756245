"""Ultralytics' data sets and losses, as a search, a score or a compensation takes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from ultralytics.cfg import get_cfg
from ultralytics.data import ClassificationDataset, build_yolo_dataset
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_cls_dataset, check_det_dataset

from fastprune.data import UserData
from fastprune.training.data_for_network import DataForNetwork
from fastprune.training.objective import Objective

TASKS = ("detect", "segment", "pose", "obb", "classify")


class DataSet(DataForNetwork):
    """An Ultralytics data set, for a network of any task.

    Args:
        data: as ``YOLO.train`` takes it: a YAML file, for classification a folder; or the name of one of Ultralytics'.
        image_size: height and width of the images; None = 640, for classification 224.
        batch_size: images in a batch.
        workers: processes that read images.
        overrides: other settings of a training, such as the weights of the parts of the loss.
        classify: whether the data are for classification; None = unless they are a YAML file.

    Raises:
        ValueError: for a data set that Ultralytics cannot find or read.
    """

    def __init__(
        self,
        data: str | Path,
        image_size: int | None = None,
        batch_size: int = 16,
        workers: int = 0,
        overrides: Mapping[str, Any] | None = None,
        classify: bool | None = None,
    ) -> None:
        self.data, self.batch_size, self.workers = str(data), batch_size, workers
        self.overrides = {key: value for key, value in (overrides or {}).items() if key not in ("model", "mode")}
        self.name = f"yolo:{data}"
        if classify is None:
            classify = Path(self.data).suffix.lower() not in (".yaml", ".yml")
            if classify and not (Path(self.data) / "train").is_dir():  # which Ultralytics would split or fetch
                raise ValueError(f"data {self.name!r}: give a .yaml file, or for classification a folder with train/")
        self.classify = classify
        self.image_size = image_size or (224 if classify else 640)
        try:
            self.parts: dict[str, Any] = (check_cls_dataset if classify else check_det_dataset)(self.data)
        except Exception as error:  # Ultralytics raises what it likes
            raise ValueError(f"data {self.name!r}: {' '.join(str(error).split())}") from error
        self.shape: tuple[int, int, int] = (int(self.parts.get("channels", 3)), self.image_size, self.image_size)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.parts["nc"])

    def open(self, network: nn.Module) -> tuple[UserData, Objective]:
        """Return the data as a network reads them, without augmentation, and its loss on them.

        The training part is for training, the validation part for tests.

        Args:
            network: the network of a ``YOLO``, ``YOLO(…).model``.

        Raises:
            ValueError: for a network of another library, of another task, or for another number of classes.
        """
        model: Any = network
        task = getattr(model, "task", None)
        if task not in TASKS or "RTDETR" in type(model).__name__:
            raise ValueError(
                f"data {self.name!r}: the network is a {type(model).__name__}; one of Ultralytics' YOLOs for "
                f"{', '.join(TASKS)} is needed"
            )
        if self.classify != (task == "classify"):
            kind = "classification" if self.classify else "detection"
            raise ValueError(f"data {self.name!r} are for {kind}, the network is for the task {task!r}")
        if self.num_classes != int(model.yaml["nc"]):
            raise ValueError(
                f"data {self.name!r} has {self.num_classes} classes, the network {model.yaml['nc']}; train the network "
                "on these data first"
            )
        given = {"task": task, "data": self.data, "imgsz": self.image_size, "rect": False}
        settings = get_cfg(overrides={**self.overrides, **given})
        train = self.read_part(model, settings, "train")
        test = self.read_part(model, settings, "val") if self.parts.get("val") else None
        data = UserData(train, test=test, num_classes=self.num_classes, name=self.name, image=self.shape)
        return data, Objective(Criterion(model, settings), run_batch)

    def read_part(self, model: Any, settings: Any, part: str) -> DataLoader[Any]:
        """Return a loader of images with their labels for ``run_batch``; only those for training are shuffled."""
        images: Dataset[Any]
        if settings.task == "classify":
            images = ClassificationDataset(str(self.parts[part]), settings, augment=False)
        else:
            stride = max(int(model.stride.max()), 32)
            images = build_yolo_dataset(
                settings, self.parts[part], self.batch_size, self.parts, mode="val", stride=stride
            )
        return DataLoader(
            images, self.batch_size, shuffle=part == "train", num_workers=self.workers, collate_fn=collect
        )


def collect(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack images; keep labels apart for each, as arrays, so that some images of a batch can be taken with theirs."""
    labels = [{k: v.numpy() if isinstance(v, Tensor) else v for k, v in item.items() if k != "img"} for item in items]
    return {"img": torch.stack([item["img"] for item in items]), "labels": labels}


def run_batch(model: Any, batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Run a network on a batch of ``collect``; return its predictions, and the batch as Ultralytics' losses take it."""
    images = batch["img"]
    images = images if images.is_floating_point() else images.float() / 255
    items = [  # copies, as collate_fn writes into them
        {key: torch.tensor(value) if hasattr(value, "dtype") else value for key, value in labels.items()}
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
