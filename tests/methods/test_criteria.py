"""Criteria: each score against its equation, computed in the plainest way, on a network with two groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastprune.graph import trace
from fastprune.methods import Task, load
from fastprune.methods.criteria.chip import independence
from fastprune.methods.criteria.obs import Surgery, rising
from fastprune.methods.registry import configure
from fastprune.planning.budget import Budget
from fastprune.testing import check_method

FROM_WEIGHTS = ("group_norm", "bn_scale", "lamp", "fpgm")
FROM_DATA = ("taylor", "fisher", "obs", "activation", "wanda", "hrank", "chip")


class Small(nn.Module):
    """Two convolutions, the second read by a convolution and, after pooling, by the classifier."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 5, 3)
        self.third = nn.Conv2d(5, 2, 1)
        self.classifier = nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.second(x))
        return self.classifier(torch.cat([x.mean((2, 3)), self.third(x).mean((2, 3))], 1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Small()
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    nn.init.normal_(model.norm.bias, std=0.5)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def graph(model):
    return trace(model, torch.zeros(2, 3, 8, 8))


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 3, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(2)
    ]


def make(name, model, graph, **options):
    worker = load(name)(configure(load(name), options))
    task = Task(model, graph, Budget.parse("flops=0.6"))
    worker.setup(task)
    return worker, task


def scores(name, model, graph, batches=(), **options):
    """Return the scores of the channels of ``first`` and of ``second``."""
    worker, task = make(name, model, graph, **options)
    for images, labels in batches:
        worker.calibrate(task, images, labels)
    groups = {group.name: group for group in graph.groups}
    values = worker.scores(task)
    return values[groups["first"].units], values[groups["second"].units]


def read_by(model, images):
    """Return what ``second`` reads, and what ``third`` and the classifier read."""
    with torch.no_grad():
        a = F.relu(model.norm(model.first(images)))
        return a, F.relu(model.second(a))


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("name", FROM_WEIGHTS)
def test_contract_of_criteria_from_weights(name, ranking):
    check_method(load(name), ranking=ranking)


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_DATA)
def test_contract_of_criteria_from_data(name):
    check_method(load(name), images=16, batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["taylor", "fisher", "obs", "activation"])
def test_contract_in_two_processes(name):
    check_method(load(name), distributed=True, images=16, batch_size=8)


def test_group_norm(model, graph):
    first, second = scores("group_norm", model, graph, p=1.0)
    with torch.no_grad():
        parts = [
            model.first.weight.abs().sum((1, 2, 3)),
            model.norm.weight.abs(),
            model.second.weight.abs().sum((0, 2, 3)),
        ]
        torch.testing.assert_close(first, torch.stack(parts).mean(0).double(), rtol=1e-5, atol=0)
        summed, _ = scores("group_norm", model, graph, p=1.0, reduction="sum")
        torch.testing.assert_close(summed, 3 * first)
        largest, _ = scores("group_norm", model, graph, p=1.0, reduction="max")
        torch.testing.assert_close(largest, torch.stack(parts).amax(0).double(), rtol=1e-5, atol=0)
        parts = [
            model.second.weight.abs().sum((1, 2, 3)),
            model.third.weight.abs().sum((0, 2, 3)),
            model.classifier.weight[:, :5].abs().sum(0),
        ]
        torch.testing.assert_close(second, torch.stack(parts).mean(0).double(), rtol=1e-5, atol=0)


def test_bn_scale_prunes_only_what_passes_a_batch_norm(model, graph):
    first, second = scores("bn_scale", model, graph)
    torch.testing.assert_close(first, model.norm.weight.detach().double().abs())
    assert not second.any()
    worker, task = make("bn_scale", model, graph)
    assert worker.prunable(task).tolist() == [u < 4 for u in range(graph.num_units)]


def test_bn_scale_refuses_a_network_without_batch_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    worker = load("bn_scale")()
    task = Task(model, trace(model, torch.zeros(1, 3, 8, 8)), Budget.parse("flops=0.5"))
    with pytest.raises(ValueError, match="choose another method"):
        worker.prunable(task)


def test_lamp(model, graph):
    norms = scores("group_norm", model, graph, p=2.0)
    for own, found in zip(norms, scores("lamp", model, graph), strict=True):
        expected = torch.stack([value / own[own >= value].sum() for value in own])
        torch.testing.assert_close(found, expected)
        assert found.max() == 1


def test_fpgm(model, graph):
    first, _ = scores("fpgm", model, graph)
    w = model.first.weight.detach().flatten(1).double()
    torch.testing.assert_close(first, (w.unsqueeze(0) - w.unsqueeze(1)).norm(dim=2).sum(1))


def test_taylor(model, graph, batches):
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weights = [model.first.weight, model.norm.weight, model.second.weight]
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
    products = [(w * g).detach() for w, g in zip(weights, gradients, strict=True)]
    parts = [products[0].abs().sum((1, 2, 3)), products[1].abs(), products[2].abs().sum((0, 2, 3))]
    first, _ = scores("taylor", model, graph, batches)
    torch.testing.assert_close(first, torch.stack(parts).mean(0).double(), rtol=1e-4, atol=1e-8)
    parts = [products[0].sum((1, 2, 3)).abs(), products[1].abs(), products[2].sum((0, 2, 3)).abs()]
    signed, _ = scores("taylor", model, graph, batches, signed=True)
    torch.testing.assert_close(signed, torch.stack(parts).mean(0).double(), rtol=1e-4, atol=1e-8)


def test_taylor_of_frozen_weights_is_the_same_and_leaves_them_frozen(model, graph, batches):
    expected = scores("taylor", model, graph, batches)
    model.requires_grad_(False)
    try:
        found = scores("taylor", model, graph, batches)
        assert not any(p.requires_grad for p in model.parameters())
    finally:
        model.requires_grad_(True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_fisher_is_the_mean_squared_gradient_of_gates(model, graph, batches):
    worker, task = make("fisher", model, graph)
    squares = torch.zeros(graph.num_units, dtype=torch.float64)
    for images, labels in batches:
        worker.calibrate(task, images, labels)
        for image, label in zip(images, labels, strict=True):
            gates = torch.ones(graph.num_units, requires_grad=True)
            loss = F.cross_entropy(task.masked(image[None], gates), label[None])
            squares += torch.autograd.grad(loss, gates)[0].double().square()
    torch.testing.assert_close(worker.scores(task), squares / 12 / 2, rtol=1e-4, atol=1e-10)


def test_activation(model, graph, batches):
    first, second = scores("activation", model, graph, batches)
    a, b = read_by(model, torch.cat([images for images, _ in batches]))
    torch.testing.assert_close(first, a.abs().mean((0, 2, 3)).double(), rtol=1e-5, atol=1e-7)
    # The second group is read as maps by ``third`` and as means by the classifier.
    means = b.mean((2, 3)).abs().mean(0)
    torch.testing.assert_close(second, ((b.abs().mean((0, 2, 3)) + means) / 2).double(), rtol=1e-5, atol=1e-7)


def test_wanda(model, graph, batches):
    first, second = scores("wanda", model, graph, batches)
    a, b = read_by(model, torch.cat([images for images, _ in batches]))
    with torch.no_grad():
        expected = model.second.weight.abs().sum((0, 2, 3)) * a.square().mean((0, 2, 3)).sqrt()
        torch.testing.assert_close(first, expected.double(), rtol=1e-5, atol=1e-7)
        by_third = model.third.weight.abs().sum((0, 2, 3)) * b.square().mean((0, 2, 3)).sqrt()
        by_classifier = model.classifier.weight[:, :5].abs().sum(0) * b.mean((2, 3)).square().mean(0).sqrt()
        torch.testing.assert_close(second, (by_third + by_classifier).double(), rtol=1e-5, atol=1e-7)


def test_wanda_of_grouped_and_transposed_layers():
    from fastprune.methods.criteria.wanda import column_sums

    torch.manual_seed(0)
    for layer in (nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2)):
        model = nn.Sequential(nn.Conv2d(3, 6, 1), layer).eval()
        found = trace(model, torch.zeros(1, 3, 8, 8)).layers[-1]
        probe = layer.weight.detach().abs()
        expected = []
        for channel in range(6):
            x = torch.zeros(1, 6, 9, 9)
            x[0, channel, 4, 4] = 1
            with torch.no_grad():
                layer.weight.copy_(probe)
                expected.append(float((layer(x) - layer(torch.zeros_like(x))).sum()))
        torch.testing.assert_close(column_sums(found, probe), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_hrank(model, graph, batches):
    first, second = scores("hrank", model, graph, batches)
    a, b = read_by(model, torch.cat([images for images, _ in batches]))
    torch.testing.assert_close(first, torch.linalg.matrix_rank(a).double().mean(0))
    rank_of_means = (b.mean((2, 3)) != 0).double().mean(0)
    torch.testing.assert_close(second, (torch.linalg.matrix_rank(b).double().mean(0) + rank_of_means) / 2)


@pytest.mark.parametrize("shape", [(4, 30), (12, 5)])
def test_independence_is_a_difference_of_nuclear_norms(shape):
    a = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = []
    for row in range(len(a)):
        without = a.clone()
        without[row] = 0
        expected.append(torch.linalg.matrix_norm(a, "nuc") - torch.linalg.matrix_norm(without, "nuc"))
    torch.testing.assert_close(independence(a), torch.stack(expected), rtol=1e-6, atol=1e-7)


def test_chip_prefers_what_others_cannot_replace():
    a = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a[3] = a[0] + a[1]  # any of the three follows from the other two
    values = independence(a)
    assert values.argmax() == 2


@pytest.mark.parametrize("groups", [1, 2])
def test_losses_of_elimination_add_up_to_the_loss_of_the_least_squares_fit(groups):
    """tr S W_P (G_PP − G_PK G_KK⁻¹ G_KP) W_Pᵀ for what has gone, in whatever order."""
    torch.manual_seed(0)
    channels, block, outputs = 5, 4, 3
    w = torch.randn(groups, outputs, channels * block, dtype=torch.float64)
    root = torch.randn(groups, 60, channels * block, dtype=torch.float64)
    gram = root.mT @ root / 60
    c = torch.randn(groups, outputs, outputs, dtype=torch.float64)
    curvature = c @ c.mT
    units = torch.arange(groups * channels).reshape(groups, channels)
    surgery = Surgery.begin(w, gram, curvature, units, block)
    group = type("Group", (), {"start": 0, "size": groups * channels})()
    group.holds = lambda u: u >= 0
    ridge = 1e-2 * gram.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1) * torch.eye(channels * block)
    gram = gram + ridge
    total, gone = 0.0, []
    for unit in (2, 0, 4):
        total += float(surgery.losses(group)[unit])
        surgery.remove(torch.tensor([unit]))
        gone.append(unit)
        rows = torch.tensor([u * block + i for u in gone for i in range(block)])
        stay = torch.tensor([i for i in range(channels * block) if i not in rows])
        g = gram[0]
        schur = g[rows][:, rows] - g[rows][:, stay] @ torch.linalg.solve(g[stay][:, stay], g[stay][:, rows])
        lost = torch.trace(curvature[0] @ w[0][:, rows] @ schur @ w[0][:, rows].T)
        assert total == pytest.approx(float(lost), rel=1e-8)


def test_rising_keeps_a_rising_sequence_and_pools_the_rest():
    values = torch.tensor([1.0, 3.0, 2.0, 4.0], dtype=torch.float64)
    found = rising(values)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.5, 2.5, 4.0], dtype=torch.float64))
    assert bool((found.diff() > 0).all())  # ties keep the order


@pytest.mark.parametrize("curvature", ["outputs", "loss", "none"])
def test_obs_removes_a_duplicate_first(batches, curvature):
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        model.second.weight[3], model.second.bias[3] = model.second.weight[1], model.second.bias[1]
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    _, second = scores("obs", model, graph, batches, curvature=curvature, exponent=1.0)
    assert second.argmin() in (1, 3)
    others = second[[u for u in range(5) if u != int(second.argmin())]]
    assert second.min() < 0.1 * others.min()


def test_obs_calibrates_alike_in_any_number_of_rounds_of_one_channel(model, graph, batches):
    whole = scores("obs", model, graph, batches, rounds=64)
    torch.testing.assert_close(scores("obs", model, graph, batches, rounds=5), whole)


def test_obs_takes_losses_to_a_power(model, graph, batches):
    wholes, roots = (scores("obs", model, graph, batches, exponent=exponent) for exponent in (1.0, 0.5))
    for whole, root in zip(wholes, roots, strict=True):
        torch.testing.assert_close(root, whole.sqrt())


def test_obs_keeps_what_it_cannot_measure(batches, caplog):
    """A transposed convolution has no fit; without one, its channels must not seem to cost nothing."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 3, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    worker = load("obs")(configure(load("obs"), {}))
    task = Task(model, graph, Budget.parse("flops=0.8"))
    worker.setup(task)
    assert "the channels of 2 stay" in caplog.text
    for images, labels in batches:
        worker.calibrate(task, images, labels)
    kept = {group.name: int(worker.plan(task).mask[group.units].sum()) for group in graph.groups}
    assert kept["2"] == 6
    assert kept["0"] < 6
    only = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 3, 3)).eval()
    with pytest.raises(ValueError, match="choose another method"):
        load("obs")().setup(Task(only, trace(only, torch.zeros(2, 3, 8, 8)), Budget.parse("flops=0.8")))
