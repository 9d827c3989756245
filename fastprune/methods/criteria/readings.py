"""What the readers of a unit see of it, in one form for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph, Layer
from fastprune.networks.observed import Reading


def true_readers(graph: ChannelGraph) -> list[Layer]:
    """Return the layers that read prunable channels; a depthwise one only hands them on."""
    return [layer for layer in graph.layers if not layer.depthwise and bool((layer.in_units >= 0).any())]


def feature_maps(reading: Reading, values: Tensor | None = None) -> Tensor:
    """Return what a layer read, channels second: [N, C, ...]; N may be a multiple of the batch (windows of attention).

    Args:
        reading: the reading.
        values: other values in the shape of what it read; None = what it read.
    """
    return (reading.x if values is None else values).movedim(reading.layer.channel_dim, 1)


def channel_totals(readings: Sequence[Reading], measure: Callable[[Tensor], Tensor], num_units: int) -> Tensor:
    """Add up a measure of the feature maps of each unit.

    Args:
        readings: what layers read.
        measure: ``measure(maps [N, C, ...])`` returns a sum over the samples for each channel, [C].
        num_units: U.

    Returns:
        float64 [2, U] on the CPU: the sum over all readers of a unit, and the number of maps in it.
    """
    totals = torch.zeros(2, num_units, dtype=torch.float64)
    for reading in readings:
        units = reading.layer.in_units
        chosen = (units >= 0).nonzero().flatten()
        maps = feature_maps(reading).detach().float()
        totals[0].index_add_(0, units[chosen], measure(maps).to("cpu", torch.float64)[chosen])
        totals[1].index_add_(0, units[chosen], torch.full((len(chosen),), float(len(maps)), dtype=torch.float64))
    return totals
