"""The weights of units: norms and filters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastprune import models
from fastprune.graph import trace
from fastprune.methods.scores.filters import unit_filters, unit_norms
from fastprune.testing import network, traced


def loop_norms(graph, model, p):
    """Compute each unit's norm by its definition, index by index over all weights that make channels."""
    sums = [0.0] * graph.num_units
    for piece in graph.slices:
        if piece.role == "out":
            weight = model.get_parameter(piece.tensor).detach().double()
            for index, unit in enumerate(piece.units.tolist()):
                if unit >= 0:
                    sums[unit] += float(weight.select(piece.dim, index).abs().pow(p).sum())
    return torch.tensor([s ** (1 / p) for s in sums], dtype=torch.float64)


@pytest.mark.parametrize("p", [1, 2, 3.0])
def test_norms_equal_a_loop(p):
    model, graph = network(), traced()
    norms = unit_norms(graph, model, p)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, loop_norms(graph, model, p), rtol=1e-12, atol=0)


def test_all_producers_of_a_residual_stream_count():
    model, graph = network(), traced()
    stream = next(g for g in graph.groups if g.kind == "stream")
    rows = torch.cat([model.stem[0].weight.flatten(1), model.block[3].weight.flatten(1)], 1).double()
    torch.testing.assert_close(unit_norms(graph, model, 2)[stream.units], rows.detach().norm(dim=1), rtol=1e-12, atol=0)


def test_other_roles():
    model, graph = network(), traced()
    hidden = next(g for g in graph.groups if g.name == "block.0")
    columns = model.block[3].weight.detach().double().abs().sum((0, 2, 3))
    torch.testing.assert_close(unit_norms(graph, model, 1, ("in",))[hidden.units], columns)
    # Batch norm's scale and shift count; its running statistics are not weights.
    norm = model.block[1]
    both = (norm.weight.abs() + norm.bias.abs()).detach().double()
    torch.testing.assert_close(unit_norms(graph, model, 1, ("channel",))[hidden.units], both)


def test_the_order_of_a_norm_must_be_positive():
    with pytest.raises(ValueError, match=r"p 0: .*positive"):
        unit_norms(traced(), network(), 0)


def test_filters_have_the_norms():
    model, graph = network(), traced()
    norms = unit_norms(graph, model, 2)
    for group in graph.groups:
        matrices = unit_filters(graph, model, group)
        # The last layer of the squeeze-and-excitation also makes the channels of the expansion.
        assert len(matrices) == len(group.producers)
        assert all(m.shape[0] == group.size for m in matrices)
        together = torch.cat(matrices, 1).double().norm(dim=1)
        torch.testing.assert_close(together, norms[group.units], rtol=1e-12, atol=0)


def test_filters_of_units_with_several_channels():
    grouped = nn.Conv2d(8, 12, 3, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), grouped, nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 2)).eval()
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    group = next(g for g in graph.groups if g.name == "2")
    assert group.size == 6  # channel i of either half
    (filters,) = unit_filters(graph, model, group)
    expected = torch.stack(
        [torch.cat([grouped.weight[i].flatten(), grouped.weight[i + 6].flatten()]) for i in range(6)]
    )
    torch.testing.assert_close(filters, expected.detach(), rtol=0, atol=0)


def test_norms_are_deterministic_on_a_model_with_pinned_channels():
    model = models.create("resnet20")  # its zero-padded shortcuts pin channels of the later stages
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    assert any(bool((s.units < 0).any()) for s in graph.slices)
    first, second = (unit_norms(graph, model, 1) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, loop_norms(graph, model, 1), rtol=1e-12, atol=0)
