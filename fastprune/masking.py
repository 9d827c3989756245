"""The masked network: the traced graph with a gate in front of everything that reads a prunable channel."""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph
from fastprune.graph.regions import GRADIENTS, modes_kept

# In-place operators that exporters leave in the graph, and what computes the same without overwriting its input.
OUT_OF_PLACE: dict[Any, Any] = {
    getattr(torch.ops.aten, f"{name}_"): getattr(torch.ops.aten, name)
    for name in (
        *(
            "relu",
            "hardswish",
            "silu",
            "hardsigmoid",
            "sigmoid",
            "tanh",
            "hardtanh",
            "leaky_relu",
            "elu",
            "celu",
            "selu",
        ),
        *(
            "mish",
            "clamp",
            "add",
            "sub",
            "mul",
            "div",
            "dropout",
            "gelu",
            "threshold",
            "clamp_min",
            "clamp_max",
            "relu6",
        ),
    )
    if hasattr(torch.ops.aten, f"{name}_") and hasattr(torch.ops.aten, name)
}


class MaskedNetwork(nn.Module):
    """A network whose prunable channels pass through gates, in eval mode and with the model's own parameters.

    A gate sits at the input of whatever reads the channels, after the activation, so that a gate of 0 does exactly what
    removing the channel does. A depthwise convolution's input is gated as well, as DMC and DDNP do it: the same vector
    is then used before and after it. Batch norm uses its running statistics and never updates them.

    In an inexact graph (``trace(exact=False)``) the norms in front of a gate see all channels, so that their statistics
    are not those of the compact network, and the two agree only approximately.

    Args:
        graph: the traced network.
        model: the model that was traced; its parameters are shared, not copied.

    Shapes:
        ``masked(images [N, C, H, W], gates [U])`` returns what the model returns.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        super().__init__()
        self.num_units = graph.num_units
        self.any_batch = graph.traced.any_batch
        self.batch = graph.traced.inputs.batch
        self.network = gated(graph)
        codegen: Any = graph.traced.evaluation.graph._codegen
        self.out_spec: pytree.TreeSpec = codegen.pytree_info.out_spec
        share_tensors(model, self.network)
        self.network.to(next((p.device for p in model.parameters()), torch.device("cpu")))
        self.train(False)

    def train(self, mode: bool = True) -> MaskedNetwork:
        """Stays in eval mode: the exported graph has batch norm frozen and dropout off."""
        self.training = False
        return self

    def forward(self, *inputs: Any) -> Any:
        """The network's outputs; the last argument is the flat vector of gates [U]."""
        *images, gates = inputs
        if gates.shape != (self.num_units,):
            raise ValueError(f"gates: a vector of {self.num_units} units is needed, got shape {tuple(gates.shape)}")
        if not self.any_batch and images[0].shape[0] != self.batch:
            raise ValueError(
                f"images: this model could only be traced for batches of {self.batch}, got {images[0].shape[0]}; "
                "trace it with an example of the batch size that is used"
            )
        with modes_kept():
            return pytree.tree_unflatten(self.network(*images, gates), self.out_spec)


def gated(graph: ChannelGraph) -> GraphModule:
    """A copy of the traced graph with the gates as one more input."""
    traced = graph.traced.evaluation
    module = GraphModule(traced, copy.deepcopy(traced.graph))
    nodes = {node.name: node for node in module.graph.nodes}
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_module" or node.target in GRADIENTS:  # a guard on shapes; what would hide a gate's gradient
            module.graph.erase_node(node)
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    overwrites = make_out_of_place(module)
    with module.graph.inserting_after([node for node in module.graph.nodes if node.op == "placeholder"][-1]):
        gates = module.graph.placeholder("gates")
    with module.graph.inserting_after(gates):
        one = module.graph.call_function(torch.ops.aten.new_ones.default, (gates, [1]))
    with module.graph.inserting_after(one):
        padded = module.graph.call_function(torch.ops.aten.cat.default, ([gates, one],))  # the last place: always open
    inserted: dict[tuple[Node, int, bytes, str], Node] = {}
    for layer in graph.layers:
        if bool((layer.in_units >= 0).any()):
            reader = nodes[layer.node]
            source = cast("Node", reader.args[0])
            # Where something is overwritten later, each reader has a gate of its own, on a copy of what it reads.
            key = (source, layer.channel_dim, layer.in_units.numpy().tobytes(), layer.node if overwrites else "")
            if key not in inserted:
                places = torch.where(layer.in_units < 0, graph.num_units, layer.in_units)
                module.register_buffer(f"_units_{len(inserted)}", places, persistent=False)
                with module.graph.inserting_before(reader):
                    units = module.graph.get_attr(f"_units_{len(inserted)}")
                    read = module.graph.call_function(torch.ops.aten.clone.default, (source,)) if overwrites else source
                    rank = len(source.meta["val"].shape)
                    inserted[key] = insert_gate(module, padded, read, units, layer.channel_dim, rank)
            reader.update_arg(0, inserted[key])
    module.graph.lint()
    module.recompile()
    return module


def insert_gate(module: GraphModule, padded: Node, source: Node, units: Node, channel_dim: int, rank: int) -> Node:
    """Multiply ``source`` by the gates of its channels, which lie at the places ``units`` of the padded vector."""
    shape = [1] * rank
    shape[channel_dim] = -1
    chosen = module.graph.call_function(torch.ops.aten.index_select.default, (padded, 0, units))
    viewed = module.graph.call_function(torch.ops.aten.view.default, (chosen, shape))
    typed = module.graph.call_function(torch.ops.aten.type_as.default, (viewed, source))
    return module.graph.call_function(operator.mul, (source, typed))


def make_out_of_place(module: GraphModule) -> bool:
    """Replace in-place operators, so that nothing overwrites what a gate's gradient needs.

    One that writes through a view, or to what a view reads later, must stay. Returns whether any is left.
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
    """For each node, the nodes whose values may lie in the same memory: views of it and what it views."""
    memory: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        source = node.args[0] if node.args and may_alias(node) else None
        memory[node] = memory[source] if isinstance(source, Node) else []
        memory[node].append(node)
    return memory


def may_alias(node: Node) -> bool:
    """Whether a node may return its first argument or a view of it."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name
        # Returned as they are in eval mode, or where the dtype is right already, which the schema does not say.
        as_it_is = name.endswith("dropout") or name == "aten::type_as"
        return as_it_is or any(result.alias_info is not None for result in node.target._schema.returns)
    return node.target is operator.getitem


def share_tensors(model: nn.Module, network: GraphModule) -> None:
    """Let the graph's attributes be the model's own tensors, also if the model was moved since it was traced."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for module_name, module in network.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for tensors in (module._parameters, module._buffers):
            for name in list(tensors):
                if prefix + name in own:
                    tensors[name] = own[prefix + name]
