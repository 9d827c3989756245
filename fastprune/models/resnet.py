"""ResNets for 32×32 images (He et al., CVPR 2016, §4.2): ResNet-20, -32, -56 and -110."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """A shortcut without parameters ("type A"): every second pixel, and zeros for the new channels.

    The slice stays in the autograd graph. (Public pruning code builds this shortcut from ``x.data``, which cuts the
    gradient of the residual stream at each stage.)

    Args:
        new_channels: number of zero channels to add, half of them on either side.
        stride: factor of the subsampling.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C + new_channels, H / stride, W / stride]
        """Subsample and pad."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a residual connection.

    Args:
        in_channels: channels of the input.
        out_channels: channels of both convolutions.
        stride: stride of the first convolution.
        projection: 1×1 convolution as the shortcut where the shape changes ("type B") instead of ``PadShortcut``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        if stride == 1 and in_channels == out_channels:
            self.shortcut: nn.Module = nn.Identity()
        elif projection:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        else:
            self.shortcut = PadShortcut(out_channels - in_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A CIFAR ResNet of depth 6n + 2: three stages of n blocks with 16, 32 and 64 channels.

    Args:
        depth: 6n + 2, for example 20, 32, 56 or 110.
        num_classes: size of the output.
        in_channels: channels of the image.
        shortcut: "A" (subsampling and zero padding, the papers' choice) or "B" (1×1 convolutions).

    Raises:
        ValueError: if the depth is not 6n + 2, or the shortcut unknown.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: got {depth}; a CIFAR ResNet has 6n + 2 layers, such as 20, 32, 56 or 110")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut: got {shortcut!r}; give 'A' (zero padding) or 'B' (1x1 convolution)")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._build_stage(16, 16, blocks, 1, shortcut == "B")
        self.layer2 = self._build_stage(16, 32, blocks, 2, shortcut == "B")
        self.layer3 = self._build_stage(32, 64, blocks, 2, shortcut == "B")
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _build_stage(in_channels: int, out_channels: int, blocks: int, stride: int, projection: bool) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride, projection)
        rest = (BasicBlock(out_channels, out_channels, 1, projection) for _ in range(blocks - 1))
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        """Return the scores of the classes."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def resnet20(num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> ResNet:
    """Build ResNet-20: 0.27 M parameters, 40.55 M MACs at 3×32×32."""
    return ResNet(20, num_classes, in_channels, shortcut)


def resnet32(num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> ResNet:
    """Build ResNet-32: 0.46 M parameters, 68.86 M MACs at 3×32×32."""
    return ResNet(32, num_classes, in_channels, shortcut)


def resnet56(num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> ResNet:
    """Build ResNet-56: 0.85 M parameters, 125.49 M MACs at 3×32×32."""
    return ResNet(56, num_classes, in_channels, shortcut)


def resnet110(num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> ResNet:
    """Build ResNet-110: 1.73 M parameters, 252.89 M MACs at 3×32×32."""
    return ResNet(110, num_classes, in_channels, shortcut)
