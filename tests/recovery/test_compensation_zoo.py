"""Every kind of compensation on networks of every shape, trained for seconds: exact, and closer to the full one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.host.distributed import Distributed
from fastprune.recovery import COMPENSATIONS, compensate_weights
from fastprune.recovery.statistics import measure_statistics
from fastprune.surgery import cut, masked

SIZE, CLASSES = 64, 10


def resnext() -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, groups=8, width_per_group=4)


def densenet() -> nn.Module:
    import torchvision

    return torchvision.models.DenseNet(16, (4, 4), 32, num_classes=CLASSES)


def coatnet() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("test_coatnet", num_classes=CLASSES, img_size=SIZE)
    return model


def named(name: str) -> Callable[[], nn.Module]:
    return lambda: fp.models.create(name, num_classes=CLASSES)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, frozenset[str]]] = {
    "depthwise": (named("torchvision:mobilenet_v3_small"), 4, frozenset({"mean", "bn"})),
    "grouped": (resnext, 4, frozenset({"mean", "bn"})),
    "dense": (densenet, 4, frozenset({"mean", "bn"})),
    "rewritten": (named("torchvision:shufflenet_v2_x0_5"), 8, frozenset({"mean", "bn"})),
    "ConvNeXt": (named("timm:test_convnext"), 4, frozenset()),
    "attention": (coatnet, 4, frozenset({"bn"})),
    "inexact": (named("timm:test_convnext"), 4, frozenset()),
}
"""What builds the network, every which unit goes, and which of the kinds that fit no weights help too.

A mean keeps the mean of each output, not its squares, and layer norms have no statistics to measure.
"""


def make_batches(templates: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return a maker of images of ten classes, smooth patterns under smooth noise."""

    def batch(size: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (size,))
        return templates[labels] + 3 * F.avg_pool2d(torch.randn(size, 3, SIZE, SIZE), 5, 1, 2), labels

    return batch


def train(model: nn.Module, batch: Callable[[int], tuple[Tensor, Tensor]]) -> nn.Module:
    """Train for 40 steps: with random weights errors grow from layer to layer, in trained networks they do not."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        images, labels = batch(32)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
    measure_statistics(model, [(batch(32)[0],) for _ in range(8)], Distributed())  # their averages lag behind
    return model.eval().requires_grad_(False)


def error(network: nn.Module, reference: nn.Module, batches: list[Tensor]) -> float:
    """Return the squared error as a part of the variance."""
    outputs = [(network(x), reference(x)) for x in batches]
    lost = sum((a - b).square().sum() for a, b in outputs)
    return float(lost / sum((b - b.mean(0)).square().sum() for _, b in outputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_is_exact_and_comes_closer(name: str) -> None:
    make, every, helpful = NETWORKS[name]
    torch.manual_seed(0)
    batch = make_batches(10 * F.avg_pool2d(torch.randn(CLASSES, 3, SIZE, SIZE), 15, 1, 7))
    model = train(make(), batch)
    calibration, held_out = [(batch(16)[0],) for _ in range(16)], [batch(16)[0] for _ in range(4)]
    graph = fp.trace(model, torch.zeros(1, 3, SIZE, SIZE), exact=name != "inexact")
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[group.start + every - 1 : group.start + group.size : every] = 0
    plan = graph.plan(mask)
    assert plan.exact == (name != "inexact")
    raw = cut(plan, model, graph.traced)
    assert isinstance(raw.model, fp.RewrittenNetwork) == (name == "rewritten")
    errors = {"none": error(raw.model, model, held_out)}
    for how in COMPENSATIONS[:-1]:
        changed, work = compensate_weights(graph, model, plan, calibration, how)
        compact = cut(raw.plan, changed, graph.traced)
        assert compact.difference < (1e-5 if plan.exact else 1)
        if plan.exact:
            x = held_out[0]
            torch.testing.assert_close(compact.model(x), masked(changed, plan)(x), rtol=1e-3, atol=1e-3)
        assert (work.fitted > 0) == (how in ("sequential", "one_pass"))
        errors[how] = error(compact.model, model, held_out)
    for how in ("sequential", "one_pass", *helpful):
        assert errors[how] < errors["none"], errors
    assert errors["sequential"] < 0.5 * errors["none"], errors
