"""Criteria against their namesakes in torch-pruning, on a network whose groups both see alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
import torchvision
from torch import nn

from fastprune.graph import trace
from fastprune.methods import Task, load
from fastprune.methods.registry import configure
from fastprune.planning.budget import Budget

IMPORTANCES = {
    "group_norm": torch_pruning.importance.GroupMagnitudeImportance(p=2),
    "taylor": torch_pruning.importance.GroupTaylorImportance(),
    "bn_scale": torch_pruning.importance.BNScaleImportance(),
    "lamp": torch_pruning.importance.LAMPImportance(p=2),
}


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
    graph = trace(model, images)
    peers = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=images)
    F.cross_entropy(model(images), labels).backward()
    return model, graph, peers, images, labels


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPORTANCES)
def test_scores_agree_with_the_peers(setting, name):
    model, graph, peers, images, labels = setting
    worker = load(name)(configure(load(name), {}))
    task = Task(model, graph, Budget.parse("flops=0.5"))
    worker.setup(task)
    if worker.needs_data:
        worker.calibrate(task, images, labels)
    scores = worker.scores(task)
    assert len(graph.groups) == 12
    for group in graph.groups:
        layer = model.get_submodule(group.name)
        channels = list(range(group.size))
        peer = IMPORTANCES[name](peers.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=channels))
        both = torch.stack([scores[group.units], peer.detach().double()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.99, group.name
