"""The ways in which papers count FLOPs.

* ``mac``: multiply-accumulates of convolutions and linear layers, each as it is executed. What the budget ``flops`` and
  every report mean.
* ``eq8``: the same with Gao et al.'s formula (CVPR 2020, eq. 8) for every convolution, k² · c_in / G · c_out · h · w
  with the original number G of groups. A depthwise layer that keeps the part q of its channels counts q², although it
  costs q.
* ``auth``: what the releases of Gao et al. regularise: eq8 of the layers next to a gate (``interior_units``), plus 3
  operations per output element of each for batch norm (2) and the activation (1, h-swish 4). A squeeze-and-excitation
  branch counts its two layers, h · w · c of the scaling and C more. Stem, shortcuts, other convolutions and the
  classifier are not in it, so a budget ``auth=0.5`` is half of what can be pruned, as p in the papers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from fastprune.graph.cost import CostModel, Term
from fastprune.graph.interior import Flow, interior_units
from fastprune.graph.structure import GraphStructure, Layer

Flops = Literal["mac", "eq8", "auth"]

BATCH_NORM = 2  # operations per element: a scale and a shift
ACTIVATION = 1
HARDSWISH = 4


def counted(graph: GraphStructure, flops: str) -> CostModel:
    """The cost model of a network in one of the conventions.

    Raises:
        ValueError: for another name.
    """
    if flops not in get_args(Flops):
        raise ValueError(f"flops {flops!r}: the conventions are {', '.join(get_args(Flops))}")
    if flops == "mac":
        return graph.cost_model
    literal = with_fixed_groups(graph)
    return literal if flops == "eq8" else next_to_gates(graph, literal)


def with_fixed_groups(graph: GraphStructure) -> CostModel:
    """eq8: depthwise layers shrink with their inputs and with their outputs."""
    depthwise = {layer.weight for layer in graph.layers if layer.depthwise}
    sizes = {(sliced.tensor, sliced.dim): sliced.size for sliced in graph.cost_model.dims}
    terms = []
    for term in graph.cost_model.terms:
        if term.tensor in depthwise and term.dims:
            (dim,) = term.dims
            terms.append(replace(term, macs=0.0))  # the weight's elements, and so the parameters, are what they are
            terms.append(replace(term, dims=(dim, dim), constant=term.constant / sizes[dim], params=0.0))
        else:
            terms.append(term)
    return replace(graph.cost_model, terms=terms)


def next_to_gates(graph: GraphStructure, literal: CostModel) -> CostModel:
    """auth: only layers that shrink with a gate, with their normalisations and activations."""
    inside, flow = interior_units(graph), Flow(graph)
    gated = [
        layer for layer in graph.layers
        if any(bool(inside[units[units >= 0]].any()) for units in (layer.in_units, layer.out_units))
    ]  # fmt: skip
    excitations = {layer.node for layer in gated if flow.only_scales(layer)}
    squeezes = {layer.node for layer in gated if flow.readers(layer) and flow.readers(layer) <= excitations}
    near = {layer.weight for layer in gated}
    terms = [term if term.tensor in near else replace(term, macs=0.0) for term in literal.terms]
    for layer in gated:
        if layer.node in excitations:
            terms.append(of_outputs(graph, layer, flow.pixels_scaled(layer)))
            terms.append(Term(layer.weight, (), float(len(layer.out_units)), 1.0, 0.0))
        elif layer.node not in squeezes:
            activation = HARDSWISH if flow.activation_after(layer) == "hardswish" else ACTIVATION
            terms.append(of_outputs(graph, layer, layer.positions * (BATCH_NORM + activation)))
    return replace(literal, terms=terms, fixed_macs=0)


def of_outputs(graph: GraphStructure, layer: Layer, operations: int) -> Term:
    """So many operations for each channel that a layer makes."""
    for piece in graph.slices:
        if piece.tensor == layer.weight and piece.role in ("out", "depthwise"):
            return Term(layer.weight, ((layer.weight, piece.dim),), 1.0, float(operations), 0.0)
    return Term(layer.weight, (), float(len(layer.out_units)), float(operations), 0.0)
