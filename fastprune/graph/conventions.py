"""The conventions by which papers count FLOPs.

* ``mac``: multiply-accumulates of convolutions and linear layers, each as it is executed. The budget ``flops`` and
  every report count these.
* ``eq8``: the same with Gao et al.'s formula (CVPR 2020, eq. 8) for every convolution, k² · c_in / G · c_out · h · w
  with the original number G of groups. A depthwise layer that keeps the fraction q of its channels counts q², although
  it costs q.
* ``auth``: the cost that the releases of Gao et al. regularise: eq8 of layers next to a gate (``interior_units``), plus
  3 operations per output element of each for batch norm (2) and the activation (1, h-swish 4). A squeeze-and-excitation
  branch counts its two layers, h · w · c of the scaling and C more. Stem, shortcuts, other convolutions and the
  classifier do not count, so a budget ``auth=0.5`` is half of what can be pruned, as p in the papers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from fastprune.graph.cost import CostModel, Term
from fastprune.graph.interior import Flow, interior_units
from fastprune.graph.structure import GraphStructure, Layer, belong_to

Flops = Literal["mac", "eq8", "auth"]

BATCH_NORM = 2  # operations per element: a scale and a shift
ACTIVATION = 1
HARDSWISH = 4


def cost_model_in(graph: GraphStructure, flops: str) -> CostModel:
    """Return the cost model of a network in one of the conventions.

    Raises:
        ValueError: if there is no such convention.
    """
    if flops not in get_args(Flops):
        raise ValueError(f"flops {flops!r}: the conventions are {', '.join(get_args(Flops))}")
    if flops == "mac":
        return graph.cost_model
    eq8 = eq8_model(graph)
    return eq8 if flops == "eq8" else auth_model(graph, eq8)


def eq8_model(graph: GraphStructure) -> CostModel:
    """Let depthwise layers shrink with their inputs and with their outputs."""
    depthwise = {layer.weight for layer in graph.layers if layer.depthwise}
    sizes = {(sliced.tensor, sliced.dim): sliced.size for sliced in graph.cost_model.dims}
    terms = []
    for term in graph.cost_model.terms:
        if term.tensor in depthwise and term.dims:
            (dim,) = term.dims
            terms.append(replace(term, macs=0.0))  # the number of parameters does not change
            terms.append(replace(term, dims=(dim, dim), constant=term.constant / sizes[dim], params=0.0))
        else:
            terms.append(term)
    return replace(graph.cost_model, terms=terms)


def auth_model(graph: GraphStructure, eq8: CostModel) -> CostModel:
    """Count only layers that shrink with a gate, with their normalisations and activations."""
    inside, flow = interior_units(graph), Flow(graph)
    gated = [
        layer
        for layer in graph.layers
        if any(bool(belong_to(units, inside).any()) for units in (layer.in_units, layer.out_units))
    ]
    excitations = {layer.node for layer in gated if flow.only_scales(layer)}
    squeezes = {layer.node for layer in gated if flow.readers(layer) and flow.readers(layer) <= excitations}
    near = {layer.weight for layer in gated}
    terms = [term if term.tensor in near else replace(term, macs=0.0) for term in eq8.terms]
    for layer in gated:
        if layer.node in excitations:
            terms.append(output_term(graph, layer, flow.scaled_pixels(layer)))
            terms.append(Term(layer.weight, (), float(len(layer.out_units)), 1.0, 0.0))
        elif layer.node not in squeezes:
            activation = HARDSWISH if flow.activation_after(layer) == "hardswish" else ACTIVATION
            terms.append(output_term(graph, layer, layer.positions * (BATCH_NORM + activation)))
    return replace(eq8, terms=terms, fixed_macs=0)


def output_term(graph: GraphStructure, layer: Layer, operations: int) -> Term:
    """Return the term of ``operations`` for each output channel of a layer."""
    for piece in graph.slices:
        if piece.tensor == layer.weight and piece.role in ("out", "depthwise"):
            return Term(layer.weight, ((layer.weight, piece.dim),), 1.0, float(operations), 0.0)
    return Term(layer.weight, (), float(len(layer.out_units)), float(operations), 0.0)
