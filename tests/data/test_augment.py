"""Cutout, lighting and mixup."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastprune.data.augment import cutout, lighting, mixup


@pytest.mark.parametrize("side", [1, 4, 5, 40])
def test_cutout_takes_one_square_out_of_each_image(side: int) -> None:
    images = torch.randn(2000, 3, 12, 9).abs() + 1
    before = images.clone()
    found = cutout(images, side, np.random.default_rng(0))
    assert torch.equal(images, before)
    gone = found == 0
    assert torch.equal(found[~gone], images[~gone])
    assert torch.equal(gone.any(1), gone.all(1))  # from all channels
    inside = torch.zeros(12, 9, dtype=torch.bool)
    for image in gone[:, 0]:
        rows, columns = image.any(1), image.any(0)
        assert torch.equal(image, rows[:, None] & columns[None, :])
        for part in (rows, columns):
            places = part.nonzero()[:, 0]
            assert 1 <= len(places) <= side
            assert int(places[-1] - places[0]) + 1 == len(places)
        inside |= image
    assert bool(inside.all())  # squares reach every pixel


def test_most_squares_are_whole() -> None:
    gone = (cutout(torch.ones(2000, 1, 32, 32), 16, np.random.default_rng(1)) == 0).sum((1, 2, 3))
    # Along each side 17 of 32 centres leave all 16 pixels inside.
    assert abs(float((gone == 256).double().mean()) - (17 / 32) ** 2) < 0.03


def test_mixup_blends_the_loss_like_the_images() -> None:
    images, labels = torch.randn(16, 3, 5, 5), torch.randint(7, (16,))
    blended, targets = mixup(images, labels, 7, 0.4, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    share, partner = float(rng.beta(0.4, 0.4)), torch.from_numpy(rng.permutation(16))
    torch.testing.assert_close(blended, share * images + (1 - share) * images[partner])
    scores = torch.randn(16, 7)
    for smoothing in (0.0, 0.1):
        apart = [F.cross_entropy(scores, of, label_smoothing=smoothing) for of in (labels, labels[partner])]
        whole = F.cross_entropy(scores, targets, label_smoothing=smoothing)
        torch.testing.assert_close(whole, share * apart[0] + (1 - share) * apart[1])


def test_shares_follow_the_beta_distribution() -> None:
    rng = np.random.default_rng(0)
    images, labels = torch.randn(2, 1, 1, 1), torch.tensor([0, 1])
    shares = torch.stack([mixup(images, labels, 2, 0.2, rng)[1][0, 0] for _ in range(2000)])
    # In half of the draws an image is its own partner. Beta(α, α) has the variance 1 / (4 (2α + 1)).
    drawn = shares[shares < 1]
    assert abs(float(drawn.mean()) - 0.5) < 0.03
    assert abs(float(drawn.var()) - 1 / (4 * 1.4)) < 0.02


def test_lighting_moves_each_image_along_the_components_of_colours() -> None:
    images, std = torch.randn(4000, 3, 2, 2, dtype=torch.float64), (0.5, 0.25, 0.2)
    before = images.clone()
    change = lighting(images, 0.1, std, np.random.default_rng(0)) - images
    assert torch.equal(images, before)
    assert float((change - change[:, :, :1, :1]).abs().max()) < 1e-12  # the same on all pixels of an image
    colours = change[:, :, 0, 0] * torch.tensor(std)  # of pixels from 0 to 1
    variances, vectors = torch.linalg.eigh(colours.T.cov())
    published = torch.tensor([0.0045, 0.0188, 0.2175], dtype=torch.float64) * 0.1
    assert torch.allclose(variances.sqrt(), published, rtol=0.05)
    grey = torch.tensor([-0.5675, -0.5808, -0.5836], dtype=torch.float64)  # the first component: brightness
    assert abs(float(vectors[:, 2] @ grey)) > 0.999
    assert float(colours.mean(0).abs().max()) < 1e-3
