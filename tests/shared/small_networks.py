"""Networks of somebody's own, which no name builds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """A network of somebody's own."""

    def __init__(self, width: int = 12, stride: int = 1) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.second, self.last = nn.Conv2d(width, 10, 3), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.last(x.mean((2, 3)))


class Split(nn.Module):
    """A network whose code cuts at fixed places, so that its compact form is a rewritten graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 12, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(8, 6, 1)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(torch.relu(self.first(x)), [4, 8], 1)
        return self.last(torch.cat([self.left(a), self.right(b)], 1).mean((2, 3)))


class PlainCNN(nn.Module):
    """Three convolutions and a linear layer, without residual blocks; 3x16x16 images."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(24, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class UNet(nn.Module):
    """A U-Net of two levels with a skip connection; a dict of scores [N, 3, H, W], as torchvision returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.merge = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.down1(x)
        coarse = self.up(self.down2(F.max_pool2d(fine, 2)))
        return {"out": self.head(self.merge(torch.cat([fine, coarse], 1)))}


class TwoInputs(nn.Module):
    """A convolution of an image and a linear layer of numbers, joined to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()
        )
        self.numbers = nn.Linear(5, 8)
        self.head = nn.Linear(32, 1)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image).mean((2, 3)), F.relu(self.numbers(numbers))], 1))


def between_norms(num_classes: int = 4) -> nn.Module:
    """Return a network with a layer norm over the first of its two groups of channels."""
    from timm.layers import LayerNorm2d  # seconds, which the other networks do not need

    return nn.Sequential(
        nn.Conv2d(3, 8, 3), LayerNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes),
    )  # fmt: skip
