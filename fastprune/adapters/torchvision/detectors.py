"""Prune a detector."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD

from fastprune.adapters.torchvision.batches import read_batches, run_batch
from fastprune.adapters.torchvision.boxes import make_boxes
from fastprune.adapters.torchvision.criterion import Criterion
from fastprune.adapters.torchvision.networks import DenseNetwork, RegionNetwork
from fastprune.data import UserData
from fastprune.pruning import prune as prune_network
from fastprune.result import PruningResult

KINDS = (FasterRCNN, RetinaNet, FCOS, SSD)
USUAL_SIZE = 640


def prune(
    detector: nn.Module,
    *,
    budget: Any = "flops=0.5",
    method: str = "l1",
    data: Iterable[Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    proposals: int = 1000,
    **arguments: Any,
) -> PruningResult:
    """Prune a detector of torchvision with its own loss; it stays one, which trains, detects and saves as before.

    Args:
        detector: a FasterRCNN, MaskRCNN, KeypointRCNN, RetinaNet, FCOS or SSD; it is not changed.
        budget: as in ``fastprune.prune``.
        method: as there; "taylor" and searches need ``data``, "l1" does not.
        data: batches (images, targets) as the detector takes them for training: images [3, H, W] from 0 to 1, a dict
            of boxes, labels, masks, … for each. They are for scores, searches and compensation.
        image_size: height and width, or both in one number, to which images are resized; costs are counted for it. None
            = an SSD's own, 640 otherwise.
        proposals: boxes of an image that an R-CNN's second stage is costed with. For losses, half of them lie about
            the objects and half anywhere.
        **arguments: further ones of ``fastprune.prune``, other than ``example_inputs``, ``loss``, ``forward`` and
            ``rewrite``.

    Returns:
        The result; its ``model`` is the traced network, and ``model.detector`` the compact detector.

    Raises:
        TypeError: for another model, or an argument that this function decides.
        ValueError: as ``fastprune.prune``.
    """
    if not isinstance(detector, KINDS):
        raise TypeError(
            f"detector: got {type(detector).__name__}; one of {', '.join(k.__name__ for k in KINDS)} is needed"
        )
    if clash := sorted({"example_inputs", "loss", "forward", "rewrite"} & set(arguments)):
        raise TypeError(f"{', '.join(clash)}: this function decides it; call fastprune.prune(network, …) instead")
    if proposals < 2:
        raise ValueError(f"proposals: got {proposals}; 2 or more are needed")
    own = getattr(detector.transform, "fixed_size", None)
    size = image_size or (own[::-1] if own else USUAL_SIZE)
    height, width = (size, size) if isinstance(size, int) else size
    regions = isinstance(detector, FasterRCNN)
    network: nn.Module = RegionNetwork(detector) if regions else DenseNetwork(detector)
    if data is not None:
        reader = read_batches(data, detector, (height, width), proposals if regions else None)
        arguments |= {"data": UserData(reader), "forward": run_batch, "loss": Criterion(detector, (height, width))}
    device = next(detector.parameters()).device
    example: Any = torch.zeros(1, 3, height, width, device=device)
    if regions:
        example = (example, make_boxes(proposals, height, width)[None].to(device))
    return prune_network(network, example, method=method, budget=budget, rewrite=False, **arguments)
