"""Networks of somebody's own, which no name builds."""

from __future__ import annotations

import torch
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
