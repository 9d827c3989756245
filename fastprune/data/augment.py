"""Augmentation of whole batches: shifts and flips of small images; cutout, lighting and mixup during a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.data.batches import Noise

# Principal components of the colours of ImageNet's pixels from 0 to 1, a column of red, green and blue for each, and
# their standard deviations, as AlexNet's preparation has them.
COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
DEVIATIONS = (0.2175, 0.0188, 0.0045)


@dataclass(frozen=True)
class ShiftAndFlip:
    """A random crop of the zero-padded image, then a horizontal flip with probability ½.

    Args:
        padding: pixels of zeros around the image; each shift from -padding to padding is equally likely.
        flip: whether to flip; mirror images of digits, for one, do not keep their class.
    """

    padding: int
    flip: bool

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """Transform each image by its own random bits.

        Args:
            images: [N, C, H, W], any dtype; zero is the value of the margin.
            noise: [N] random bits, one word per image.

        Returns:
            Tensor of the shape and dtype of ``images``.
        """
        count, channels, height, width = images.shape
        span = np.uint64(2 * self.padding + 1)
        # 20 bits per shift keep the bias of the modulo below 1e-5; every draw has its own bits.
        down = torch.from_numpy(((noise & np.uint64(0xFFFFF)) % span).astype(np.int64)).to(images.device)
        right = torch.from_numpy((((noise >> np.uint64(20)) & np.uint64(0xFFFFF)) % span).astype(np.int64))
        columns = torch.arange(width).expand(count, width)
        if self.flip:
            mirrored = torch.from_numpy(((noise >> np.uint64(40)) & np.uint64(1)).astype(np.bool_))
            columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
        columns = (columns + right[:, None]).to(images.device)
        rows = torch.arange(height, device=images.device) + down[:, None]
        padded = F.pad(images, (self.padding,) * 4)
        return padded[
            torch.arange(count, device=images.device)[:, None, None, None],
            torch.arange(channels, device=images.device)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


def cutout(images: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """Set a square of each image to zero, the mean of normalised images (DeVries and Taylor, 2017).

    Args:
        images: [N, C, H, W]; not changed.
        side: side of the squares in pixels. Their centres are anywhere in the image, so parts of them may lie outside.
        rng: source of the centres.

    Returns:
        Images [N, C, H, W].
    """
    height, width = images.shape[2:]

    def outside(size: int) -> Tensor:
        first = torch.from_numpy(rng.integers(size, size=(len(images), 1))) - side // 2
        places = torch.arange(size)
        return (places < first) | (places >= first + side)

    kept = outside(height)[:, None, :, None] | outside(width)[:, None, None, :]
    return images * kept.to(images.device, images.dtype)


def lighting(images: Tensor, strength: float, std: Sequence[float], rng: np.random.Generator) -> Tensor:
    """Change colour and brightness of each image along the principal components of ImageNet's colours.

    An image gets Σ α_i λ_i p_i on all its pixels, with components p_i, their deviations λ_i, and α_i from a normal
    distribution (Krizhevsky et al., NeurIPS 2012, §4.1).

    Args:
        images: [N, 3, H, W], normalised; not changed.
        strength: standard deviation of α; 0.1 as published.
        std: the deviation by which each channel of pixels from 0 to 1 was divided.
        rng: source of α.

    Returns:
        Images [N, 3, H, W].
    """
    amounts = rng.normal(0.0, strength, (len(images), 3)) * np.array(DEVIATIONS)
    colours = torch.from_numpy(amounts @ np.array(COMPONENTS).T / np.array(std))
    return images + colours[:, :, None, None].to(images.device, images.dtype)


def mixup(
    images: Tensor, labels: Tensor, classes: int, alpha: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Blend each image with another of the batch, and their targets alike (Zhang et al., ICLR 2018).

    Args:
        images: [N, C, H, W].
        labels: [N].
        classes: number of classes K.
        alpha: α of the distribution Beta(α, α) of the share, which is one number for the batch.
        rng: source of share and partners.

    Returns:
        Images [N, C, H, W] and the probabilities of classes [N, K].
    """
    share = float(rng.beta(alpha, alpha))
    partner = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    targets = F.one_hot(labels, classes).float()
    return torch.lerp(images[partner], images, share), torch.lerp(targets[partner], targets, share)
