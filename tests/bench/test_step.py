"""Both versions of the step compute the same, and the floor is the work that nobody can save."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastprune import models
from fastprune.bench import step
from fastprune.bench.case import OURS
from fastprune.bench.shapes import convolutions_of

CPU = torch.device("cpu")


def bottlenecks() -> nn.Module:
    resnet = pytest.importorskip("torchvision.models.resnet")
    model: nn.Module = resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], num_classes=5, width_per_group=16)
    return model


def basic_blocks() -> nn.Module:
    return models.ResNet(14)


@pytest.mark.parametrize("make", [bottlenecks, basic_blocks])
@pytest.mark.parametrize("half", [False, True])
def test_gradients_are_equal_in_double_precision(make: object, half: bool) -> None:
    torch.manual_seed(0)
    model = step.prepare(make(), CPU).double()  # type: ignore[operator]
    network = step.Network(model)
    counts = [size // 2 if half else size for size in network.gates]
    theta = torch.cat([(torch.arange(n) < k).double() for n, k in zip(network.gates, counts, strict=True)])
    theta.requires_grad_()
    images, labels = torch.randn(2, 3, 64, 64).double(), torch.tensor([0, 3])
    losses = [loss(theta, images, labels) for loss in both(network, counts)]
    plain, ours = (torch.autograd.grad(loss, theta)[0] for loss in losses)
    torch.testing.assert_close(losses[1], losses[0])
    assert (plain[theta == float(not half)] != 0).double().mean() > 0.6  # closed gates have gradients, too
    assert (ours - plain).norm() < 1e-5 * plain.norm()  # float32 where the loss is computed


def both(network: step.Network, counts: list[int]) -> tuple[step.Plain, step.Ours]:
    return step.Plain(network, torch.contiguous_format), step.Ours(network, counts)


def test_gates_follow_every_convolution_inside_a_block() -> None:
    assert step.Network(bottlenecks()).gates == [16, 16, 16, 16, 32, 32, 64, 64, 128, 128]
    assert step.Network(models.resnet56()).gates == [16] * 9 + [32] * 9 + [64] * 9


def test_a_step_follows_the_gradient_and_changes_no_gate() -> None:
    case = next(iter(step.cases(CPU, quick=True)))
    ours = case.variants[OURS]
    assert isinstance(ours, step.Step)
    before = ours.theta.detach().clone()
    assert before.sum() == len(before)
    gradient = ours(*case.draw())
    moved = ours.theta.detach() - before
    expected = torch.where(gradient > 0, -step.LEARNING_RATE, 0.0)  # parameters at 1 cannot rise
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
    assert (ours.theta >= 0.5).all()


def test_the_floor_of_open_gates_is_every_convolution() -> None:
    network = step.Network(step.prepare(basic_blocks(), CPU))
    floor = step.Floor(network, network.gates, torch.zeros(2, 3, 32, 32))
    forward = 2 * 2 * sum(shape.macs * shape.count for shape in convolutions_of(basic_blocks(), 32))
    first_two = 2 * 2 * 32 * 32 * (16 * 3 * 9 + 16 * 16 * 9)  # before all gates
    assert floor.work()[1] == forward + (forward - first_two)
    assert floor() is None


def test_the_floor_of_half_of_the_gates() -> None:
    network = step.Network(step.prepare(bottlenecks(), CPU))
    floor = step.Floor(network, [size // 2 for size in network.gates], torch.zeros(2, 3, 32, 32))
    # The second block, 256 to 16 to 16 to 256 channels; it follows the stem, the first block and its shortcut.
    widths = [(x.shape[1], weight.shape[0]) for x, weight, _ in floor.forward[5:8]]
    assert widths == [(256, 16), (8, 16), (8, 256)]
    # Only two convolutions of the first block have gradients of their inputs.
    widths = [(dz.shape[1], x.shape[1]) for dz, x, _, _ in floor.backward[:5]]
    assert widths == [(8, 16), (256, 16), (8, 256), (8, 16), (256, 16)]
    floor()
