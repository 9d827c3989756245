"""The width and the cost of every layer of a network, in full and under a mask."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune.graph.structure import GraphStructure


@dataclass(frozen=True)
class LayerWidth:
    """One layer, before and after pruning.

    Args:
        layer: the module's name.
        kind: the operator, "conv2d" say.
        channels: (all output channels, those that stay).
        macs: (full, planned) multiply-accumulates per sample, over all uses of the layer.
        params: (full, planned) parameters of its weight.
    """

    layer: str
    kind: str
    channels: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]


def layer_widths(graph: GraphStructure, mask: Tensor) -> list[LayerWidth]:
    """Return the layers of a network in the order of execution, each once.

    Args:
        graph: the network.
        mask: flat mask [U]; 1 = the unit stays.
    """
    model, keep = graph.cost_model, mask.detach().cpu().bool()
    columns = []
    for kept in (torch.ones_like(keep), keep):
        elements = model.elements(model.kept(kept)).tolist()
        macs: dict[str, float] = defaultdict(float)
        params: dict[str, float] = defaultdict(float)
        for term, number in zip(model.terms, elements, strict=True):
            macs[term.tensor] += number * term.macs
            params[term.tensor] += number * term.params
        columns.append((macs, params))
    (full_macs, full_params), (macs, params) = columns
    rows: dict[str, LayerWidth] = {}
    for layer in graph.layers:
        stays = torch.cat([keep, keep.new_ones(1)])[layer.out_units]  # index -1, always kept, is the appended True
        weight = layer.weight
        rows.setdefault(
            layer.name,
            LayerWidth(
                layer=layer.name,
                kind=layer.kind,
                channels=(len(stays), int(stays.sum())),
                macs=(round(full_macs[weight]), round(macs[weight])),
                params=(round(full_params[weight]), round(params[weight])),
            ),
        )
    return list(rows.values())
