"""The units that the scales of batch norms can close."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprune.graph import ChannelGraph, Group
from fastprune.methods.scores.filters import UnitNorm, unit_batch_norms
from fastprune.networks.masked import MaskedNetwork


@torch.no_grad()
def find_closable_units(graph: ChannelGraph, model: nn.Module, masked: MaskedNetwork) -> Tensor:
    """Find by trying the units whose readers see zeros once γ and β of all their batch norms are zero, bool [U].

    A unit is not closable where a value reaches a reader past every batch norm: from a convolution without one, or from
    an activation that is not zero at zero. Units of frozen batch norms are not closable either.
    """
    norms = unit_batch_norms(graph, model)
    inputs = probe_inputs(graph, next(model.parameters()).device)
    closable = torch.zeros(graph.num_units, dtype=torch.bool)
    passed, frozen = torch.zeros(2, graph.num_units, dtype=torch.bool)
    for norm in norms:
        passed[norm.units[norm.units >= 0]] = True
        if not norm.module.weight.requires_grad:
            frozen[norm.units[norm.units >= 0]] = True
    for group in graph.groups:
        if not bool(passed[group.units].any()):
            continue
        originals = zero_scales(norms, group)
        closable[group.units] = (masked.energies(*inputs)[group.units] == 0).cpu() & (passed & ~frozen)[group.units]
        for parameter, value in originals:
            parameter.copy_(value)
    return closable


def zero_scales(norms: Sequence[UnitNorm], group: Group) -> list[tuple[nn.Parameter, Tensor]]:
    """Set γ and β of a group's channels to zero; return the changed parameters with copies of their old values."""
    originals: list[tuple[nn.Parameter, Tensor]] = []
    for norm in norms:
        inside = ((norm.units >= group.start) & (norm.units < group.start + group.size)).nonzero().flatten()
        for parameter in (norm.module.weight, norm.module.bias):
            if len(inside) and parameter is not None:
                originals.append((parameter, parameter.clone()))
                parameter.index_fill_(0, inside.to(parameter.device), 0.0)
    return originals


def probe_inputs(graph: ChannelGraph, device: torch.device) -> list[Tensor]:
    """Make inputs like the example's with random floats; zeros or equal images in a batch would hide differences."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(x.shape, generator=generator).to(x.dtype) if x.is_floating_point() else x).to(device)
        for x in graph.traced.inputs.tensors
    ]
