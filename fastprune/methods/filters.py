"""The weights behind each unit: norms of all units at once, and the filters of one group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprune.graph import ChannelGraph, Group
from fastprune.graph.propagate import Role


def unit_norms(graph: ChannelGraph, model: nn.Module, p: float = 2.0, roles: Sequence[Role] = ("out",)) -> Tensor:
    """The p-norm of each unit's weights, over all parameters that the unit has a part in.

    Args:
        graph: the channels of ``model``.
        model: where the weights are.
        p: of the norm, above 0.
        roles: which weights count: "out" the filters that make the channel, "in" those that read it, "depthwise", and
            "channel" for batch norm's scale and shift and biases.

    Returns:
        ``(Σ |w|^p)^(1/p)`` of each unit, float64 [U] on the CPU; summed in float64 in a fixed order.

    Raises:
        ValueError: if p is not positive.
    """
    if not p > 0:
        raise ValueError(f"p {p}: the p of a norm must be positive")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = torch.zeros(graph.num_units + 1, dtype=torch.float64)  # the last entry takes what is always kept
    for piece in graph.slices:
        if piece.role in roles and piece.tensor in parameters:
            rows = parameters[piece.tensor].detach().movedim(piece.dim, 0).to(torch.float64)
            # Added up on the CPU: there index_add has one order, on CUDA it uses atomics.
            powers = rows.reshape(len(rows), -1).abs().pow(p).sum(1).cpu()
            total.index_add_(0, torch.where(piece.units < 0, graph.num_units, piece.units), powers)
    return total[:-1].pow(1 / p)


def unit_filters(graph: ChannelGraph, model: nn.Module, group: Group) -> list[Tensor]:
    """The filters that make the channels of one group, one matrix for each layer that makes them.

    Args:
        graph: the channels of ``model``.
        model: where the weights are.
        group: a group of ``graph``.

    Returns:
        For each layer a matrix [group.size, n], row i with all weights that make the group's unit i, in the weight's
        own dtype and on its device. (Where a unit stands for several channels of a layer, they lie side by side.)
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    matrices = []
    for piece in graph.weights_of_group(group, ("out",)):
        inside = ((piece.units >= group.start) & (piece.units < group.start + group.size)).nonzero().flatten()
        order = inside[piece.units[inside].argsort(stable=True)]
        weight = parameters[piece.tensor].detach()
        matrices.append(
            weight.index_select(piece.dim, order.to(weight.device)).movedim(piece.dim, 0).reshape(group.size, -1)
        )
    return matrices
