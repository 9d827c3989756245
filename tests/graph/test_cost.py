"""Cost: exact for masks, differentiable, cross-checked with torch's own counter."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp

LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v3_small", "regnet_y_400mf")]


@pytest.mark.parametrize("name", ["resnet18", pytest.param("shufflenet_v2_x1_0", marks=pytest.mark.slow), *LARGE])
def test_full_macs_equal_torchs_counter(name: str) -> None:
    model = getattr(torchvision.models, name)().eval()
    images = torch.zeros(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    graph = fp.trace(model, images)
    assert int(graph.cost().macs) * 2 == counter.get_total_flops()
    assert int(graph.cost().params) == sum(p.numel() for p in model.parameters())


def test_gradients_equal_difference_quotients(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    mask = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: graph.cost(m).macs / 1e4, mask.requires_grad_())
    assert torch.autograd.gradcheck(lambda m: graph.cost(m).params / 1e2, mask)


def test_batch_of_the_example_does_not_matter(tiny: nn.Module) -> None:
    one, five = (fp.trace(tiny, torch.zeros(n, 3, 16, 16)).cost().macs for n in (1, 5))
    assert one == five


def test_transposed_convolution_counts_input_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, stride=2), nn.Conv2d(6, 2, 1))
    graph = fp.trace(model, torch.zeros(1, 3, 5, 7))
    assert int(graph.cost().macs) == 35 * (3 * 4 + 4 * 6 * 4) + 4 * 35 * 6 * 2


def test_a_mask_of_another_length_is_refused(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="a vector of 50 units is needed"):
        graph.cost(torch.ones(49))
