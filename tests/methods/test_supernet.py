"""The super-net: stages on slices of the weights, with the full network's features."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.graph import ChannelGraph, find_stages
from fastprune.methods.sp.stage_graphs import cut_out
from fastprune.methods.sp.supernet import SuperNet, make_adaptor


def prepare(name: str) -> tuple[nn.Module, ChannelGraph, SuperNet, Tensor]:
    torch.manual_seed(0)
    model = fp.models.create(name).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    graph = fp.trace(model, images)
    return model, graph, SuperNet(graph, model, find_stages(graph)), images


def make_identity_(net: SuperNet) -> None:
    for adaptor in net.adaptors:
        assert isinstance(adaptor, nn.Conv2d)
        with torch.no_grad():
            adaptor.weight.copy_(torch.eye(adaptor.out_channels)[:, :, None, None])
            adaptor.bias.zero_()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        *(
            pytest.param(f"torchvision:{name}", marks=pytest.mark.slow)
            for name in ("mobilenet_v2", "shufflenet_v2_x1_0")
        ),
    ],
)
def test_full_stages_with_identity_adaptors_have_no_loss(name: str) -> None:
    model, graph, net, images = prepare(name)
    make_identity_(net)
    reference = copy.deepcopy(model).train()
    features, outputs = net.run_full(images)
    assert torch.allclose(outputs, reference(images), rtol=1e-10)
    for buffer, expected in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.allclose(buffer, expected, rtol=1e-10)
    everything = torch.ones(graph.num_units, dtype=torch.bool)
    for number in range(len(net.stages)):
        assert float(net.distance(number, features[number], features[number + 1], everything).detach()) < 1e-20
    half = everything.clone()
    for group in graph.groups:
        half[group.start + max(1, group.size // 2) : group.start + group.size] = False
    for number, stage in enumerate(net.stages):
        if stage.groups:
            assert float(net.distance(number, features[number], features[number + 1], half).detach()) > 1e-6


def test_distillation_trains_its_stage_only_and_no_running_statistics() -> None:
    model, graph, net, images = prepare("torchvision:resnet18")
    features, _ = net.run_full(images)
    assert not any(x.requires_grad for x in features)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    width = 5
    for group in graph.groups:
        mask[group.start + width : group.start + group.size] = False
    net.distance(1, features[1], features[2], mask).backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == {name for name, _ in model.named_parameters() if name.startswith("layer2.")}
    # The stage reads all 64 channels of the full network and makes 5.
    gradient = model.get_parameter("layer2.0.conv1.weight").grad
    assert gradient is not None
    assert bool((gradient[:width] != 0).any(dim=(2, 3)).all())
    assert int(gradient[width:].count_nonzero()) == 0
    gradient = net.adaptors[1].weight.grad  # inputs are sliced, outputs are not
    assert isinstance(gradient, Tensor)
    assert gradient.shape == (128, 128, 1, 1)
    assert bool((gradient[:, :width] != 0).all())
    assert int(gradient[:, width:].count_nonzero()) == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_features_of_a_search_change_nothing() -> None:
    model, _, net, images = prepare("resnet20")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features = net.features(images)
    assert all(torch.equal(a, b) for a, b in zip(features, net.run_full(images)[0], strict=True))
    model.load_state_dict(before)
    net.features(images)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_stage_that_reads_more_than_its_features_is_refused() -> None:
    graph = fp.trace(model := fp.models.create("torchvision:resnet18"), torch.zeros(1, 3, 48, 48))
    first, second, *_ = find_stages(graph)
    inside = next(n for n in graph.traced.evaluation.graph.nodes if n.name == "batch_norm_6")  # one of two branches
    wrong = dataclasses.replace(second, start=inside.name)
    with pytest.raises(ValueError, match="reads more of the network than its features"):
        cut_out(graph, model, wrong, make_adaptor(wrong, model))
    assert cut_out(graph, model, first, make_adaptor(first, model))[1] == (2, 3, 48, 48)


def test_cumulative_statistics_are_refused() -> None:
    model = fp.models.create("resnet20")
    model.bn1.momentum = None
    graph = fp.trace(model, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="bn1: batch norms with cumulative statistics"):
        SuperNet(graph, model, find_stages(graph))
