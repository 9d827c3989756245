"""A detector's own loss, on outputs of its heads that are given."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from fastprune.adapters.torchvision.boxes import inside
from fastprune.adapters.torchvision.networks import MOST_DETECTIONS


class Criterion:
    """A detector's own loss, the sum of its parts, on outputs that are given.

    A copy of the detector runs its own code for training; its layers return the outputs in place of computing them.

    Args:
        detector: the full detector.
        size: height and width of the images.
    """

    def __init__(self, detector: Any, size: tuple[int, int]) -> None:
        self.size = size
        self.outputs: Any = None
        self.boxes: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.detector: Any = self.stand_in(copy.deepcopy(detector))

    def stand_in(self, made: Any) -> Any:
        """Turn a detector into one without weights, whose layers return ``outputs``."""
        with torch.no_grad():
            features = made.eval().backbone(torch.zeros(1, 3, *self.size, device=next(made.parameters()).device))
        places = features if isinstance(features, Mapping) else {"0": features}
        sizes = {name: x.shape[-2:] for name, x in places.items()}
        made.train()
        for module in made.modules():
            module._parameters.clear()
            module._buffers.clear()
        made.transform.forward = self.as_they_are
        made.backbone.forward = lambda images: {n: images.new_zeros(len(images), 1, *s) for n, s in sizes.items()}
        if not isinstance(made, FasterRCNN):
            made.head.forward = lambda features: self.outputs
            return made
        made.rpn.head.forward = lambda features: self.outputs["rpn"]
        made.rpn.filter_proposals = lambda *arguments: (self.boxes, None)
        heads = made.roi_heads
        heads.select_training_samples = lambda boxes, targets: self.label(heads, boxes, targets)
        for name in ("box", "mask", "keypoint"):
            if name == "box" or getattr(heads, f"has_{name}")():
                getattr(heads, f"{name}_roi_pool").forward = lambda features, boxes, sizes: features["0"]
                getattr(heads, f"{name}_head").forward = lambda features: features
        heads.box_predictor.forward = lambda features: tuple(rows[torch.cat(self.kept)] for rows in self.outputs["box"])
        for name in ("mask", "keypoint"):
            if getattr(heads, f"has_{name}")():
                getattr(heads, f"{name}_predictor").forward = lambda features, name=name: self.of_objects(name)
        return made

    def as_they_are(self, images: list[Tensor], targets: Any) -> tuple[ImageList, Any]:
        """Return images that are resized already, in place of the detector's transform."""
        return ImageList(torch.stack(images), [self.size] * len(images)), targets

    def label(self, heads: Any, boxes: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Any, Any, Any, Any]:
        """Return (boxes, objects, labels, regression targets) of the boxes that are an object or none of any.

        ``RoIHeads.select_training_samples`` draws some of them; here all count.
        """
        objects, labels = heads.assign_targets_to_proposals(
            boxes, [t["boxes"] for t in targets], [t["labels"] for t in targets]
        )
        # Masks and keypoints are predicted for the first boxes alone.
        most = MOST_DETECTIONS if heads.has_mask() or heads.has_keypoint() else len(boxes[0])
        first = torch.arange(len(boxes[0]), device=boxes[0].device) < most
        chosen = [torch.where((label == 0) | (label > 0) & first)[0] for label in labels]
        self.kept = [place * len(boxes[0]) + indices for place, indices in enumerate(chosen)]
        boxes, objects, self.labels = (
            [x[indices] for x, indices in zip(values, chosen, strict=True)] for values in (boxes, objects, labels)
        )
        matched = [
            target["boxes"][index] if len(target["boxes"]) else torch.zeros_like(box)
            for target, index, box in zip(targets, objects, boxes, strict=True)
        ]
        return boxes, objects, self.labels, heads.box_coder.encode(matched, boxes)

    def of_objects(self, name: str) -> Tensor:
        """Return the masks or keypoints of the boxes that are objects."""
        count = len(self.boxes[0])
        most = min(count, MOST_DETECTIONS)
        rows = [
            kept[label > 0] % count + place * most
            for place, (kept, label) in enumerate(zip(self.kept, self.labels, strict=True))
        ]
        predicted: Tensor = self.outputs[name]
        return predicted[torch.cat(rows)]

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch."""
        images = batch["images"]
        targets = [
            {k: torch.tensor(v, device=images.device) if hasattr(v, "dtype") else v for k, v in target.items()}
            for target in batch["targets"]
        ]
        self.outputs = outputs
        if "boxes" in batch:
            self.boxes = list(inside(batch["boxes"], images))
        losses = self.detector(list(images), targets)
        self.outputs = None
        total: Tensor = torch.stack(list(losses.values())).sum()
        return total
