"""The weights of each unit: norms, filters, batch norms, and tables for proximal steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastprune.graph import ChannelGraph, Group
from fastprune.graph.structure import Role, belong_to
from fastprune.ops import UnitTable


def unit_norms(graph: ChannelGraph, model: nn.Module, p: float = 2.0, roles: Sequence[Role] = ("out",)) -> Tensor:
    """Compute the p-norm of each unit's weights, over all parameters that belong to the unit.

    Args:
        graph: the channels of ``model``.
        model: the network with the weights.
        p: the order of the norm, above 0.
        roles: the weights that count: "out" for the filters that make the channel, "in" for those that read it,
            "depthwise", and "channel" for biases and the scale and shift of batch norms.

    Returns:
        ``(Σ |w|^p)^(1/p)`` of each unit, float64 [U] on the CPU; summed in float64 in a fixed order.

    Raises:
        ValueError: if p is not positive.
    """
    if not p > 0:
        raise ValueError(f"p {p}: the order of a norm must be positive")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = torch.zeros(graph.num_units + 1, dtype=torch.float64)  # the last entry is for channels without a unit
    for piece in graph.slices:
        if piece.role in roles and piece.tensor in parameters:
            rows = parameters[piece.tensor].detach().movedim(piece.dim, 0).to(torch.float64)
            # index_add has one order on the CPU; on CUDA it uses atomics.
            powers = rows.reshape(len(rows), -1).abs().pow(p).sum(1).cpu()
            total.index_add_(0, torch.where(piece.units < 0, graph.num_units, piece.units), powers)
    return total[:-1].pow(1 / p)


def unit_filters(graph: ChannelGraph, model: nn.Module, group: Group) -> list[Tensor]:
    """Return the filters that make the channels of one group, one matrix for each layer that makes them.

    Args:
        graph: the channels of ``model``.
        model: the network with the weights.
        group: a group of ``graph``.

    Returns:
        One matrix [group.size, n] per layer: row i has all weights that make the group's unit i, in the weight's dtype
        and on its device. Where a unit stands for several channels of a layer, their weights lie side by side.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    matrices = []
    for piece in graph.weights_of_group(group, ("out",)):
        inside = group.holds(piece.units).nonzero().flatten()
        order = inside[piece.units[inside].argsort(stable=True)]
        weight = parameters[piece.tensor].detach()
        matrices.append(
            weight.index_select(piece.dim, order.to(weight.device)).movedim(piece.dim, 0).reshape(group.size, -1)
        )
    return matrices


def unit_table(graph: ChannelGraph, model: nn.Module, roles: Sequence[Role], units: Tensor) -> UnitTable:
    """Build the table of units' parameters for the proximal operator of their norms.

    Args:
        graph: the channels of ``model``.
        model: the network with the weights, on the device of the steps.
        roles: the parameters of a unit: "out" for the filters that make the channel, "depthwise", "channel" for biases
            and the scale and shift of batch norms, or "in" for the columns that read it.
        units: the units with an entry in the table, bool [U].

    Returns:
        A table of all U units, empty for those outside ``units``. It leaves out parameters without ``requires_grad``.

    Raises:
        ValueError: if one of the parameters belongs to units along two of its dimensions.
        TypeError: if the parameters are neither all float32 nor all float64.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    slices: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}
    for piece in graph.slices:
        if piece.role in roles and piece.tensor in parameters and parameters[piece.tensor].requires_grad:
            outside = ~belong_to(piece.units, units)
            if not bool(outside.all()):
                parameter = parameters[piece.tensor]
                slices[id(parameter), piece.dim] = parameter.detach(), piece.dim, piece.units.masked_fill(outside, -1)
    return UnitTable(list(slices.values()), graph.num_units)


@dataclass(frozen=True)
class UnitNorm:
    """A batch norm with scale and shift, whose channels belong to units.

    Args:
        name: the name of the module.
        module: the batch norm.
        units: the unit of each channel, int64 [C]; -1 = none.
    """

    name: str
    module: _BatchNorm
    units: Tensor


def unit_batch_norms(graph: ChannelGraph, model: nn.Module) -> list[UnitNorm]:
    """Return the batch norms with scale and shift that channels of units pass, in the order of the network."""
    norms = []
    for piece in graph.slices:
        owner, _, attribute = piece.tensor.rpartition(".")
        module = model.get_submodule(owner)
        if attribute == "weight" and isinstance(module, _BatchNorm) and bool((piece.units >= 0).any()):
            norms.append(UnitNorm(owner, module, piece.units))
    return norms


def require_batch_norms(graph: ChannelGraph, model: nn.Module, prunable: Tensor, method: str) -> Tensor:
    """Return the prunable units that pass a batch norm with a scale, bool [U].

    Args:
        graph: the channels of ``model``.
        model: the network.
        prunable: the units that may go otherwise, bool [U].
        method: the method's name, for the message.

    Raises:
        ValueError: if there are none.
    """
    passes = torch.zeros(graph.num_units, dtype=torch.bool)
    for norm in unit_batch_norms(graph, model):
        passes[norm.units[norm.units >= 0]] = True
    found = prunable & passes
    if not bool(found.any()):
        raise ValueError(f"{method}: no prunable channel passes a batch norm with a scale; choose another method")
    return found
