"""Rewritten graphs of a network for SP: one also returns the features of stages, one is a single stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph
from fastprune.graph.export.nodes import concrete
from fastprune.graph.model_state import attribute_of, state_of
from fastprune.graph.stages import Stage
from fastprune.networks.traced_copy import (
    copy_traced,
    make_out_of_place,
    return_flat,
    share_tensors,
    use_batch_statistics,
)

ADAPTOR = "stage_adaptor"


def build_feature_graph(
    graph: ChannelGraph, model: nn.Module, stages: Sequence[Stage], *, training: bool, batch_statistics: bool = True
) -> GraphModule:
    """Build the network's graph that returns the features at the ends of stages, and then the outputs.

    Args:
        graph: the traced network.
        model: the model that was traced, whose tensors the graph uses.
        stages: the stages of the network.
        training: whether to update running statistics and apply dropout.
        batch_statistics: whether batch norms take the statistics of the batch; otherwise the running ones.
    """
    module = copy_traced(graph)
    return_flat(module)
    overwrites = make_out_of_place(module)
    nodes = {node.name: node for node in module.graph.nodes}
    features = [nodes[stage.end] for stage in stages]
    if overwrites:  # later writes must not change the features
        for place, node in enumerate(features):
            with module.graph.inserting_after(node):
                features[place] = module.graph.call_function(torch.ops.aten.clone.default, (node,))
    output = next(iter(module.graph.find_nodes(op="output")))
    output.args = ((*features, *pytree.tree_leaves(output.args[0])),)
    if batch_statistics:
        use_batch_statistics(module, update=training)
    else:
        module.recompile()
    share_tensors(model, module)
    return module


def copy_whole(graph: ChannelGraph, model: nn.Module) -> GraphModule:
    """Copy the whole network, on the model's tensors; it returns the first output, the scores of the main head.

    Raises:
        ValueError: if the network writes to parts of tensors.
    """
    whole = copy_traced(graph)
    if make_out_of_place(whole):
        raise ValueError("super-net: this network writes to parts of tensors, so its sub-networks cannot be measured")
    return_flat(whole)
    copied = Graph()  # the exporter's own cannot be sent to other processes
    copied.output(pytree.tree_leaves(copied.graph_copy(whole.graph, {}))[0])
    copied.eliminate_dead_code()
    module = GraphModule(whole, copied)
    share_tensors(model, module)
    return module.eval()


def cut_out(
    graph: ChannelGraph, model: nn.Module, stage: Stage, adaptor: nn.Conv2d
) -> tuple[GraphModule, tuple[int, ...]]:
    """Cut a stage out as a network with its adaptor, on the model's tensors; return it with the shape of its input.

    Raises:
        ValueError: if the stage reads values of the network other than its features, or overwrites its inputs.
    """
    whole = copy_traced(graph)
    if make_out_of_place(whole):
        raise ValueError("super-net: this network writes to parts of tensors, so its stages cannot run separately")
    nodes = {node.name: node for node in whole.graph.nodes}
    start, end = nodes[stage.start], nodes[stage.end]
    needed = nodes_between(start, end, stage)
    inner = Graph()
    features = inner.placeholder("features")
    copies: dict[Node, Any] = {start: features}
    for node in whole.graph.nodes:
        if node in needed:
            size = node.args[1] if is_size(node) and node.args[0] not in needed else None
            if size is None:
                copies[node] = inner.node_copy(node, copies.__getitem__)
            elif size == 0:  # the batch, the only size that is the same everywhere
                copies[node] = inner.call_function(torch.ops.aten.sym_size.int, (features, 0))
            else:
                copies[node] = concrete(node.meta["val"])
    weight, bias = (inner.get_attr(f"{ADAPTOR}.{name}") for name in ("weight", "bias"))
    inner.output(inner.call_function(torch.ops.aten.conv2d.default, (copies[end], weight, bias)))
    own = state_of(model) | {f"{ADAPTOR}.{name}": tensor for name, tensor in adaptor.named_parameters()}
    names = {str(node.target) for node in inner.find_nodes(op="get_attr")}
    module = GraphModule({name: own[name] if name in own else attribute_of(whole, name) for name in names}, inner)
    return module.eval(), tuple(concrete(size) for size in start.meta["val"].shape)


def nodes_between(start: Node, end: Node, stage: Stage) -> set[Node]:
    """Return the nodes that compute the value of ``end`` from that of ``start``.

    Raises:
        ValueError: if they need other values of the network.
    """
    needed: set[Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node in needed or node is start:
            continue
        if node.op == "placeholder":
            raise ValueError(f"stage {stage.name!r} reads more of the network than its features; give other stages")
        needed.add(node)
        if not (is_size(node) and cast("Node", node.args[0]) < start):
            pending += node.all_input_nodes
    return needed


def is_size(node: Node) -> bool:
    """Return whether a node reads a size of a tensor."""
    return node.target is torch.ops.aten.sym_size.int
