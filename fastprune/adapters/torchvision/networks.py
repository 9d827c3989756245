"""The networks of detectors, without the choice of boxes: images in, outputs of the heads out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from fastprune.adapters.torchvision.boxes import inside

MOST_DETECTIONS = 100
"""Boxes of an image for which an R-CNN predicts masks and keypoints, as in its evaluation."""


class DenseNetwork(nn.Module):
    """The network of a detector with one stage: its heads on every place of an image.

    Args:
        detector: a RetinaNet, FCOS or SSD, which is shared.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the head gives for images [N, 3, H, W]."""
        outputs: dict[str, Tensor] = self.detector.head(levels(self.detector.backbone(images)))
        return outputs


class RegionNetwork(nn.Module):
    """The network of an R-CNN: its proposals, and its heads on given boxes.

    Args:
        detector: a FasterRCNN, MaskRCNN or KeypointRCNN, which is shared.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, boxes: Tensor) -> dict[str, Any]:
        """Return the outputs of all heads.

        Args:
            images: [N, 3, H, W].
            boxes: [N, K, 4], two opposite corners in pixels; masks and keypoints are for the first 100.

        Returns:
            "rpn": objectness and box deltas for each level; "box": scores [N K, classes] and deltas [N K, 4 classes];
            "mask" and "keypoint", where the detector has them: [N min(K, 100), …].
        """
        heads = self.detector.roi_heads
        features = self.detector.backbone(images)
        outputs: dict[str, Any] = {"rpn": self.detector.rpn.head(levels(features))}
        boxes = inside(boxes, images)
        outputs["box"] = heads.box_predictor(heads.box_head(pool(features, boxes, images, heads.box_roi_pool)))
        for name in ("mask", "keypoint"):
            if getattr(heads, f"has_{name}")():
                pooling = getattr(heads, f"{name}_roi_pool")
                pooled = pool(features, boxes[:, :MOST_DETECTIONS], images, pooling)
                outputs[name] = getattr(heads, f"{name}_predictor")(getattr(heads, f"{name}_head")(pooled))
        return outputs


def levels(features: Any) -> list[Tensor]:
    """Return the feature maps of a backbone as a list."""
    return [features] if isinstance(features, Tensor) else list(features.values())


def pool(features: Any, boxes: Tensor, images: Tensor, pooling: Any) -> Tensor:
    """Return what ``MultiScaleRoIAlign`` gives, by operators on whole tensors: each box from the level of its size.

    Args:
        features: feature maps by name, [N, C, H, W] each.
        boxes: [N, K, 4].
        images: [N, 3, H, W].
        pooling: the ``MultiScaleRoIAlign``.

    Returns:
        [N K, C, size, size]
    """
    chosen = [features[name] for name in pooling.featmap_names if name in features]
    depths = [round(math.log2(images.shape[-1] / x.shape[-1])) for x in chosen]
    flat = boxes.flatten(0, 1)
    batch = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None, None]
    rois = torch.cat((batch.expand(-1, boxes.shape[1], 1).flatten(0, 1), flat), 1)
    sides = (flat[:, 2:] - flat[:, :2]).prod(1).sqrt()
    level = torch.floor(pooling.canonical_level + torch.log2(sides / pooling.canonical_scale) + 1e-6)
    level = level.clamp(depths[0], depths[-1])
    pooled = flat.new_zeros(())
    for x, depth in zip(chosen, depths, strict=True):
        part = roi_align(x, rois, pooling.output_size, 0.5**depth, pooling.sampling_ratio)
        pooled = pooled + part * (level == depth).to(part.dtype)[:, None, None, None]
    return pooled
