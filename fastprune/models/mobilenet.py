"""MobileNetV2 for 32×32 images, as the papers of this project prune it on CIFAR-10."""

from __future__ import annotations

from torch import Tensor, nn

# (expansion, output channels, blocks, stride of the first block); two of ImageNet's five strides stay 2, so that the
# last feature map is 8×8.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 1),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1×1 expand, 3×3 depthwise, 1×1 project, and a shortcut wherever the stride is 1.

    Unlike in ImageNet's MobileNetV2, a block that expands by 1 has its 1×1 convolution too, and a stride-1 block that
    changes its width has a 1×1 convolution as its shortcut.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        expansion: hidden channels = ``expansion * in_channels``.
        stride: stride of the depthwise convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride == 1:
            self.shortcut = nn.Identity()
            if in_channels != out_channels:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
                )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y if self.shortcut is None else y + self.shortcut(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """MobileNetV2 for 32×32 images: 2.30 M parameters, 304.08 M MACs at 3×32×32.

    Args:
        num_classes: size of the output.
        in_channels: channels of the image.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks: list[nn.Module] = []
        width = 32
        for expansion, out_channels, count, stride in STAGES:
            for index in range(count):
                blocks.append(InvertedResidual(width, out_channels, expansion, stride if index == 0 else 1))
                width = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(width, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        """Return the scores of the classes."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.blocks(x)
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def mobilenetv2(num_classes: int = 10, in_channels: int = 3) -> MobileNetV2:
    """Build a MobileNetV2 for 32×32 images."""
    return MobileNetV2(num_classes, in_channels)
