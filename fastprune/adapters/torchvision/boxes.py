"""Boxes for the second stage of an R-CNN."""

from __future__ import annotations

import torch
from torch import Tensor


def make_boxes(count: int, height: int, width: int, objects: Tensor | None = None) -> Tensor:
    """Return boxes [count, 4] for an image: the objects, boxes about them (half of all), and boxes anywhere.

    They are drawn from torch's default generator.
    """
    near = torch.zeros(0, 4) if objects is None or not len(objects) else objects
    if len(near):
        more = near[torch.arange(max(count // 2 - len(near), 0)) % len(near)]
        sides = (more[:, 2:] - more[:, :2]).repeat(1, 2)
        near = torch.cat((near, more + 0.2 * sides * torch.randn_like(more)))[:count]
    scale = torch.tensor([width, height, width, height])
    return torch.cat((near, torch.rand(count - len(near), 4) * scale))


def inside(boxes: Tensor, images: Tensor) -> Tensor:
    """Return boxes with ordered corners inside of the images, whatever numbers they hold."""
    height, width = images.shape[-2:]
    x, y = boxes[..., 0::2].clamp(0, width - 1), boxes[..., 1::2].clamp(0, height - 1)
    low, high = torch.stack((x.amin(-1), y.amin(-1)), -1), torch.stack((x.amax(-1), y.amax(-1)), -1)
    return torch.cat((low, high + 1), -1)
