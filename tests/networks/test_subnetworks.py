"""Sub-networks on slices compute what the compact copies compute, on the network's own weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.graph import ChannelGraph
from fastprune.networks.subnetworks import SubNetworks


def first_half(graph: ChannelGraph) -> Tensor:
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    for group in graph.groups:
        mask[group.start + max(1, group.size // 2) : group.start + group.size] = False
    return mask


def prepare(name: str) -> tuple[nn.Module, ChannelGraph, SubNetworks, Tensor]:
    torch.manual_seed(0)
    model = fp.models.create(name).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    graph = fp.trace(model, images)
    return model, graph, SubNetworks(graph, model), images


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("resnet20", "first"),
        ("resnet20", "random"),
        pytest.param("torchvision:mobilenet_v3_small", "random", marks=pytest.mark.slow),
        pytest.param("torchvision:shufflenet_v2_x1_0", "first", marks=pytest.mark.slow),
        pytest.param("torchvision:densenet121", "random", marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_those_of_the_compact_copy(name: str, which: str) -> None:
    model, graph, networks, images = prepare(name)
    mask = first_half(graph)
    if which == "random":
        for group in graph.groups:
            mask[group.units] = mask[group.units][torch.randperm(group.size)]
    plan = graph.plan(mask)
    compact = fp.apply(plan, model).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs, wanted = networks(images, mask=mask), compact(images)
    assert torch.allclose(outputs, wanted, rtol=1e-10, atol=1e-12)
    outputs.square().sum().backward()
    wanted.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for key, parameter in compact.named_parameters():
        found = gradients[key]
        assert found is not None
        kept = found
        for piece in plan.slices:
            if piece.tensor == key:
                kept = kept.index_select(piece.dim, plan.kept_indices(piece))
        assert parameter.grad is not None
        assert torch.allclose(kept, parameter.grad, rtol=1e-8, atol=1e-10 * float(wanted.detach().square().sum()))
        assert int(found.count_nonzero()) <= parameter.numel()  # none outside of the slice
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_first_channels_are_views() -> None:
    model, graph, networks, _ = prepare("resnet20")
    mask = first_half(graph)
    name = "layer1.1.conv1.weight"
    weight, whole = networks.slice_tensor(name, networks.kept_indices(mask)), model.get_parameter(name)
    assert weight.shape == (8, 8, 3, 3)
    assert weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_changed_weights_are_noticed() -> None:
    model, graph, networks, images = prepare("resnet20")
    mask = first_half(graph)
    with torch.no_grad():
        first = networks(images, mask=mask)
        model.fc.bias.add_(1.0)
        assert torch.allclose(networks(images, mask=mask), first + 1)


def test_a_graph_is_rewritten_once_where_it_depends_on_no_width() -> None:
    class Plain(nn.Module):
        def __init__(self, groups: int) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.deep, self.last = nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.deep(self.norm(self.first(x)).relu())).mean((2, 3))

    for groups in (1, 8):
        model = Plain(groups).double()
        images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
        graph = fp.trace(model, images)
        networks = SubNetworks(graph, model)
        masks = [torch.arange(graph.num_units) % 8 < width for width in (3, 5)]
        assert (networks.rewrite_for(masks[0]) is networks.rewrite_for(masks[1])) == (groups == 1)
        for mask in masks:
            wanted = fp.apply(graph.plan(mask), model).train()(images)
            assert torch.allclose(networks(images, mask=mask), wanted, rtol=1e-10)


def test_heads_of_train_mode_alone_are_no_obstacle() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.first(x).relu()
            return (self.last(x), self.head(x)) if self.training else self.last(x)

    model, images = Auxiliary().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph = fp.trace(model, images)
    assert "head.weight" in {piece.tensor for piece in graph.slices}
    mask = first_half(graph)
    wanted = fp.apply(graph.plan(mask), model)(images)
    assert torch.allclose(SubNetworks(graph, model)(images, mask=mask), wanted, rtol=1e-10)


@pytest.mark.slow
def test_graphs_are_kept_for_the_last_masks() -> None:
    _, graph, networks, _ = prepare("torchvision:mobilenet_v3_small")
    mask = first_half(graph)
    rewritten = networks.rewrite_for(mask)
    assert networks.rewrite_for(mask.clone()) is rewritten
    for unit in range(20):
        other = mask.clone()
        other[unit] = ~other[unit]
        networks.rewrite_for(other)
    assert networks.rewrite_for(mask) is not rewritten


def test_the_network_itself_does_not_change() -> None:
    model, graph, networks, images = prepare("resnet20")
    again = copy.deepcopy(model)
    networks(images, mask=first_half(graph))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert model.training == again.training
