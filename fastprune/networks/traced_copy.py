"""Copies of a traced graph on the model's own tensors, which are then changed: gates, batch statistics, kernels."""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastprune.graph import ChannelGraph
from fastprune.graph.export.nodes import set_argument
from fastprune.graph.model_state import state_of

aten = torch.ops.aten

# In-place operators that exporters leave in the graph, and what computes the same without overwriting its input.
OUT_OF_PLACE: dict[Any, Any] = {
    getattr(aten, f"{name}_"): getattr(aten, name)
    for name in (
        *("relu", "relu6", "hardswish", "silu", "hardsigmoid", "sigmoid", "tanh", "hardtanh", "leaky_relu", "elu"),
        *("celu", "selu", "mish", "gelu", "threshold", "clamp", "clamp_min", "clamp_max"),
        *("add", "sub", "mul", "div", "dropout"),
    )
    if hasattr(aten, f"{name}_") and hasattr(aten, name)
}


def copy_traced(graph: ChannelGraph) -> GraphModule:
    """Copy the graph of eval mode; ``share_tensors`` gives it the model's own tensors."""
    traced = graph.traced.evaluation
    return GraphModule(traced, copy.deepcopy(traced.graph))


def return_flat(module: GraphModule) -> None:
    """Let a graph take and return flat lists, without the exporter's guards on the shapes of inputs."""
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            module.graph.erase_node(node)
    module.graph.set_codegen(torch.fx.graph.CodeGen())


def share_tensors(model: nn.Module, network: GraphModule) -> None:
    """Let the graph's attributes be the model's own tensors, also if the model was moved since it was traced."""
    own = state_of(model)
    for module_name, module in network.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for tensors in (module._parameters, module._buffers):
            for name in list(tensors):
                if prefix + name in own:
                    tensors[name] = own[prefix + name]


def version(tensor: Tensor) -> tuple[Any, ...]:
    """Return a value that changes when a tensor is written into, replaced or moved."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.device


def make_out_of_place(module: GraphModule) -> bool:
    """Replace in-place operators, so that nothing overwrites what a gate's gradient needs.

    An operator that writes through a view, or to what a view reads later, must stay.

    Returns:
        Whether any is left.
    """
    memory = shared_memory(module)
    left = False
    for node in list(module.graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in OUT_OF_PLACE:
            overwritten = cast("Node", node.args[0])
            others = [n for n in memory[overwritten] if n < node and n is not overwritten]
            if any(user > node for other in others for user in other.users):
                left = True
                continue
            node.target = getattr(OUT_OF_PLACE[packet], node.target._overloadname)
            later = {user for user in overwritten.users if user is not node and user > node}
            overwritten.replace_all_uses_with(node, delete_user_cb=later.__contains__)
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            left = True
    return left


def shared_memory(module: GraphModule) -> dict[Node, list[Node]]:
    """Map each node to the nodes whose values may lie in the same memory: views of it and what it views."""
    memory: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        source = node.args[0] if node.args and may_alias(node) else None
        memory[node] = memory[source] if isinstance(source, Node) else []
        memory[node].append(node)
    return memory


def may_alias(node: Node) -> bool:
    """Return whether a node may return its first argument or a view of it."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name
        # These return their input itself in eval mode, or where it has the dtype; the schema does not say so.
        unchanged = name.endswith("dropout") or name == "aten::type_as"
        return unchanged or any(result.alias_info is not None for result in node.target._schema.returns)
    return node.target is operator.getitem


def use_batch_statistics(module: GraphModule, *, update: bool) -> None:
    """Let the batch norms of an eval-mode graph use the statistics of the batch.

    Args:
        module: the graph, changed in place.
        update: whether the running statistics are updated, as in training; dropout is then on, too.
    """
    for node in module.graph.nodes:
        if node.target is aten.batch_norm.default:
            for name in ("running_mean", "running_var") if not update else ():
                set_argument(node, name, None)
            set_argument(node, "training", True)
        elif node.target is aten.dropout.default and update:
            set_argument(node, "train", True)
    module.graph.eliminate_dead_code()
    module.recompile()


def let_views_copy(module: GraphModule) -> None:
    """Replace views by reshapes: a value in channels_last cannot be viewed in the order of a contiguous one."""
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default


def replace_by_module(module: GraphModule, node: Node, name: str, by: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Compute a node by a module.

    Args:
        module: the graph, changed in place.
        node: erased.
        name: the submodule's name.
        by: what computes the node.
        arguments: what it is called with.
    """
    module.add_submodule(name, by)
    with module.graph.inserting_before(node):
        call = module.graph.call_module(name, arguments)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)
