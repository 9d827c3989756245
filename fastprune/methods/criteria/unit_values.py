"""Values of single weights, added up to values of units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastprune.graph import ChannelGraph
from fastprune.graph.structure import Role
from fastprune.methods.scores.ranking import RankingConfig
from fastprune.options import option

Reduction = Literal["mean", "sum", "max"]

FILTERS: tuple[Role, ...] = ("out", "depthwise", "in", "channel")
"""Roles of the weights of a unit: filters that make the channel, columns that read it, scales of its batch norms."""


@dataclass(frozen=True)
class GroupConfig(RankingConfig):
    """Options of a criterion that joins the values of all weights of a unit."""

    reduction: Reduction = option("mean", "how the values of a unit's tensors are joined")


def unit_values(
    graph: ChannelGraph,
    model: nn.Module,
    value: Callable[[str, Tensor], Tensor | None],
    *,
    reduction: Reduction = "mean",
    roles: Sequence[Role] = FILTERS,
    absolute: bool = False,
) -> Tensor:
    """Add up values of weights within each tensor of a unit, then join the tensors.

    Biases do not count, as is usual: they are no weights of other channels.

    Args:
        graph: the channels of ``model``.
        model: the network.
        value: ``value(name, parameter)`` returns the values of a parameter's elements, in its shape; None leaves the
            parameter out.
        reduction: "mean", "sum" or "max" over the tensors that a unit has a part in.
        roles: the roles of the tensors that count.
        absolute: whether the sum within a tensor is taken without its sign.

    Returns:
        float64 [U] on the CPU, summed in a fixed order; 0 for units without a part in any tensor.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = torch.zeros(graph.num_units + 1, dtype=torch.float64)  # the last entry is for channels without a unit
    counts = torch.zeros_like(total)
    for piece in graph.slices:
        if piece.role not in roles or piece.tensor not in parameters or is_bias(piece.tensor):
            continue
        values = value(piece.tensor, parameters[piece.tensor].detach())
        if values is None:
            continue
        channels = values.movedim(piece.dim, 0).flatten(1).sum(1, dtype=torch.float64) if values.dim() > 1 else values
        places = torch.where(piece.units < 0, graph.num_units, piece.units)
        own = torch.zeros_like(total).index_add_(0, places, channels.to("cpu", torch.float64))
        own = own.abs() if absolute else own
        touched = torch.zeros_like(total).index_fill_(0, places, 1.0)
        total = torch.maximum(total, own) if reduction == "max" else total + own
        counts += touched
    joined = total / counts.clamp(min=1) if reduction == "mean" else total
    return joined[:-1]


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias or a batch norm's shift."""
    return name.rpartition(".")[2] == "bias"
