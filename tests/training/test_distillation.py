"""Distances from a teacher's outputs: values by hand, nests, stage ends, refusals."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.training.distillation import (
    Distillation,
    divergence,
    find_stage_ends,
    relative_error,
    squared_error,
    watch,
)
from fastprune.training.objective import Objective


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_of_two_classes_by_hand() -> None:
    """At T = 2 the scores (0, 2 ln 3) become the probabilities (1/4, 3/4), those of (0, 0) are (1/2, 1/2)."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 2 * math.log(3)]])
    by_hand = 4 * (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))
    assert divergence(student, teacher, 2.0).item() == pytest.approx(by_hand, rel=1e-6)
    assert divergence(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 2, 6)])
def test_divergence_and_its_gradient(shape: tuple[int, ...]) -> None:
    """The gradient is T (softmax(s / T) − softmax(t / T)), over the number of samples and pixels."""
    student, teacher = noise(*shape).requires_grad_(), 3 * noise(*shape, seed=1)
    loss = divergence(student, teacher, 3.0)
    p, q = (torch.softmax(x.detach().double() / 3, 1) for x in (teacher, student))
    count = teacher.numel() // shape[1]
    assert loss.item() == pytest.approx(float(9 * (p * (p.log() - q.log())).sum() / count), rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert torch.allclose(student.grad.double(), 3 * (q - p) / count, atol=1e-7)


def test_squared_error_of_nests() -> None:
    pair = namedtuple("pair", ["a", "b"])
    a, b, c, d = (noise(2, 3, seed=seed) for seed in range(4))
    whole = torch.arange(3)
    output = OrderedDict(x=a, y=[pair(b.bfloat16(), None), whole])
    wanted = {"x": c, "y": [pair(d, None), whole + 1]}
    by_hand = (F.mse_loss(a, c) + F.mse_loss(b.bfloat16().float(), d)) / 2
    assert squared_error(output, wanted).item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("output", "wanted", "message"),
    [
        ((noise(2), noise(2)), noise(2), "output is a tensor, that of the network in train mode is a tuple of 2"),
        ({"a": noise(2)}, {"b": noise(2)}, "is a dict of 'b', .* a dict of 'a'"),
        ([{"a": noise(2)}], [{"a": noise(3)}], r"its output\[0\]\['a'\] are of shape \[3\], the network's of \[2\]"),
        (torch.arange(2), torch.arange(2), "holds no tensors of floating-point numbers"),
        ("text", "text", "type str holds no tensors"),
    ],
)
def test_other_forms_are_refused(output: Any, wanted: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        squared_error(output, wanted)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores are of shape \[2, 10\], the network's of \[2, 4\]"):
        divergence(noise(2, 4), noise(2, 10), 1.0)


def test_relative_error_does_not_depend_on_the_scale() -> None:
    a, b = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    error = relative_error(a, b)
    assert error.item() == pytest.approx(float((a - b).square().sum() / b.square().sum()), rel=1e-5)
    assert relative_error(100 * a, 100 * b).item() == pytest.approx(error.item(), rel=1e-5)
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0


class Net(nn.Module):
    """Two blocks at each of two resolutions; ``wide`` channels inside of them."""

    def __init__(self, wide: int, stream: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stream, 3, padding=1)
        self.a = self.block(stream, wide)
        self.b = self.block(stream, wide)
        self.down = nn.AvgPool2d(2)
        self.c = self.block(stream, wide)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(stream, 4)

    @staticmethod
    def block(stream: int, wide: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(stream, wide, 1), nn.ReLU(inplace=True), nn.Conv2d(wide, stream, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        x = self.down(x + self.b(x))
        return self.fc(self.pool(x + self.c(x)).flatten(1))


def features_of(net: nn.Module) -> dict[str, Tensor]:
    with watch(net, tuple(name for name, _ in net.named_modules())) as kept:
        net(noise(2, 3, 8, 8))
    assert not any(module._forward_hooks for module in net.modules())
    return kept


def test_stage_ends_are_the_last_modules_of_each_resolution_that_correspond() -> None:
    teacher = features_of(Net(8))
    assert find_stage_ends(features_of(Net(5)), teacher) == {"b": None, "c": None}
    narrow = features_of(Net(5, stream=4))
    with pytest.raises(ValueError, match="distill_features: the network has no module whose channels correspond"):
        find_stage_ends(narrow, teacher)
    stay = torch.tensor([0, 2, 3, 5])
    found = find_stage_ends(narrow, teacher, {"stem": stay, "a.2": stay, "c.2": stay, "b.2": stay[:3]})
    assert {name: None if kept is None else kept.tolist() for name, kept in found.items()} == {
        "a.2": [0, 2, 3, 5],  # not b.2, which has other channels than the plan says
        "c.2": [0, 2, 3, 5],
    }


def test_features_of_a_pruned_stream_are_compared_with_the_channels_that_stay() -> None:
    """A network that has lost channels which are zero gives the same features as its teacher."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten())
    student = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten())
    stay = torch.tensor([1, 3])
    with torch.no_grad():
        student[0].weight.copy_(teacher[0].weight[stay])
        student[0].bias.copy_(teacher[0].bias[stay])
    taught = Distillation(teacher, features=1.0, stage_ends={"0": stay})
    images = noise(2, 3, 5, 5)
    with watch(student, ["0"]) as own:
        output = student(images)
    _, metrics = taught.blend(output.sum(), output, own, Objective(), images, torch.zeros(2))
    assert metrics["features"].item() == pytest.approx(0, abs=1e-12)


def test_blend_by_hand() -> None:
    torch.manual_seed(0)
    teacher, student = Net(8).eval(), Net(5)
    images, labels = noise(6, 3, 8, 8), torch.arange(6) % 4
    taught = Distillation(teacher, temperature=2.0, weight=0.3, features=0.7, stage_ends={"b": None, "c": None})
    objective = Objective()
    with watch(student, taught.stage_ends) as own:
        scores = student(images)
    task = objective.compute(scores, labels, label_smoothing=0.1)
    loss, metrics = taught.blend(task, scores, own, objective, images, labels)
    with torch.no_grad(), watch(teacher, taught.stage_ends) as other:
        wanted = teacher(images)
    p, q = torch.softmax(wanted / 2, 1), torch.softmax(scores / 2, 1)
    kl = 4 * (p * (p.log() - q.log())).sum(1).mean()
    errors = [((own[n] - other[n]) ** 2).sum() / (other[n] ** 2).sum() for n in ("b", "c")]
    by_hand = 0.7 * task + 0.3 * kl + 0.7 * (errors[0] + errors[1]) / 2
    assert torch.allclose(loss, by_hand, rtol=1e-5)
    assert metrics["distillation"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert metrics["features"].item() == pytest.approx(sum(errors).item() / 2, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
