"""The masked network: the traced graph with a gate in front of everything that reads a prunable channel.

Two graphs compute it. In one each convolution is a call together with its batch norm, activation and the gates of what
it reads (``fusion``). It serves while nothing but gates is trained. The other has torch's operators with gates between
them, for ``torch.compile``, and where gradients of weights are wanted.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph, Layer
from fastprune.graph.export.regions import GRADIENTS, restore_modes
from fastprune.graph.structure import belong_to
from fastprune.networks.fusion import find_chains, fuse, version

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


GATE = "fastprune_gate"  # key of a node's metadata


class MaskedNetwork(nn.Module):
    """A network whose prunable channels pass through gates, in eval mode and with the model's own parameters.

    A gate sits at the input of whatever reads the channels, after the activation, so that a gate of 0 does exactly what
    removing the channel does. A depthwise convolution's input is gated as well, as DMC and DDNP do it: the same vector
    is then used before and after it. Batch norm uses its running statistics and never updates them.

    Where no gradient of a parameter is asked for, convolutions run fused and in channels_last, with weights that are
    folded once, and again when the parameters have changed. What is written through ``parameter.data`` is not noticed.

    In an inexact graph (``trace(exact=False)``) the norms in front of a gate see all channels, so that their statistics
    are not those of the compact network, and the two agree only approximately.

    Args:
        graph: the traced network.
        model: the model that was traced; its parameters are shared, not copied.
        units: which units have a gate, bool [U]; the gates of others are not read. None: all.

    Shapes:
        ``masked(images [N, C, H, W], gates [U])`` returns what the model returns.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, units: Tensor | None = None) -> None:
        super().__init__()
        self.num_units = graph.num_units
        self.any_batch = graph.traced.any_batch
        self.batch = graph.traced.inputs.batch
        codegen: Any = graph.traced.evaluation.graph._codegen
        self.out_spec: pytree.TreeSpec = codegen.pytree_info.out_spec
        units = torch.ones(graph.num_units, dtype=torch.bool) if units is None else units.cpu()
        self.network = gated(graph, units, fused=False)
        self.fused = gated(graph, units, fused=True)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for network in (self.network, self.fused):
            share_tensors(model, network)
            network.to(device)
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._batches_seen: dict[int, Any] = {}
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
        network = self.network
        if self.runs_fused():
            network = self.fused
            self.count_statistics()
        with restore_modes():
            return pytree.tree_unflatten(network(*images, gates), self.out_spec)

    @torch.no_grad()
    def energies(self, *images: Tensor) -> Tensor:
        """How strong the features of each unit are with all gates open.

        Args:
            images: what the network reads, [N, C, H, W].

        Returns:
            The mean square over batch and positions of what readers see of the unit, meant over its readers, [U];
            0 for units that have no gate.
        """
        gates = torch.ones(self.num_units, device=images[0].device)
        energies = _Energies(self.network, gates)
        with restore_modes():
            energies.run(*images, gates)
        return energies.sums / energies.counts.clamp(min=1)

    def count_statistics(self) -> None:
        """Let it be seen that statistics have changed where batch norms have seen batches since the last call.

        Torch updates them in place without counting that as a new version, as it does for all else that is written to.
        """
        for number, norm in enumerate(self._norms):
            seen = norm.num_batches_tracked
            now = seen if seen is None else version(seen)
            if self._batches_seen.setdefault(number, now) != now:
                self._batches_seen[number] = now
                increment_version([t for t in (norm.running_mean, norm.running_var) if t is not None])

    def runs_fused(self) -> bool:
        """Whether convolutions run fused now: outside of ``torch.compile``, and if no parameter wants a gradient."""
        if torch.compiler.is_compiling():
            return False
        return not torch.is_grad_enabled() or not any(p.requires_grad for p in self.network.parameters())


def gated(graph: ChannelGraph, units: Tensor, *, fused: bool) -> GraphModule:
    """A copy of the traced graph with the gates as one more input.

    Args:
        graph: the traced network.
        units: which of its units have a gate, bool [U].
        fused: whether convolutions are fused. Not where something is overwritten that others read.
    """
    traced = graph.traced.evaluation
    module = GraphModule(traced, copy.deepcopy(traced.graph))
    nodes = {node.name: node for node in module.graph.nodes}
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_module" or node.target in GRADIENTS:  # a guard on shapes; what would hide a gate's gradient
            module.graph.erase_node(node)
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    overwrites = make_out_of_place(module)
    vectors = GateVectors(module, graph.num_units)
    chains = find_chains(module) if fused and not overwrites else []
    fusable = {chain.conv for chain in chains}
    gates: dict[Node, Node] = {}
    inserted: dict[Any, Node] = {}
    for layer in graph.layers:
        if not bool(belong_to(layer.in_units, units).any()):
            continue
        reader = nodes[layer.node]
        vector = vectors.of(layer)
        if reader in fusable:
            gates[reader] = vector
            continue
        source = cast("Node", reader.args[0])
        # Where something is overwritten later, each reader has a gate of its own, on a copy of what it reads.
        key = (source, layer.channel_dim, vector, layer.node if overwrites else "")
        if key not in inserted:
            with module.graph.inserting_before(reader):
                read = module.graph.call_function(torch.ops.aten.clone.default, (source,)) if overwrites else source
                rank = len(source.meta["val"].shape)
                inserted[key] = insert_gate(module, read, vector, layer.channel_dim, rank)
                inserted[key].meta[GATE] = layer.in_units, layer.channel_dim
        reader.update_arg(0, inserted[key])
    if chains:
        for node in module.graph.nodes:
            if node.target is torch.ops.aten.view.default:  # of what may be channels_last now
                node.target = torch.ops.aten.reshape.default
        fuse(module, chains, gates)
    module.graph.lint()
    module.recompile()
    return module


class _Energies(torch.fx.Interpreter):
    """Executes a network of ``gated`` and adds up what its gates let through."""

    def __init__(self, network: GraphModule, gates: Tensor) -> None:
        super().__init__(network)
        self.sums, self.counts = torch.zeros_like(gates), torch.zeros_like(gates)

    def run_node(self, n: Node) -> Any:
        """The node's value; that of a gate is counted."""
        value = super().run_node(n)
        if GATE in n.meta:
            units, dim = n.meta[GATE]
            squares = value.float().square().transpose(0, dim).flatten(1).mean(1)
            has_gate = units >= 0
            places = units[has_gate].to(self.sums.device)
            self.sums.index_add_(0, places, squares[has_gate.to(squares.device)])
            self.counts.index_add_(0, places, torch.ones_like(squares[: len(places)]))
        return value


class GateVectors:
    """The nodes of a graph that hold the gates of a layer's input channels.

    Args:
        module: the graph, which gets the gates as its last input.
        num_units: U.
    """

    def __init__(self, module: GraphModule, num_units: int) -> None:
        self.module, self.num_units = module, num_units
        self.made: dict[bytes, Node] = {}
        graph = module.graph
        with graph.inserting_after([node for node in graph.nodes if node.op == "placeholder"][-1]):
            gates = graph.placeholder("gates")
        with graph.inserting_after(gates):
            one = graph.call_function(torch.ops.aten.new_ones.default, (gates, [1]))
        with graph.inserting_after(one):  # the last place: always open
            self.padded = graph.call_function(torch.ops.aten.cat.default, ([gates, one],))

    def of(self, layer: Layer) -> Node:
        """The gates of the channels that a layer reads."""
        key = layer.in_units.numpy().tobytes()
        if key not in self.made:
            name = f"_units_{len(self.made)}"
            places = torch.where(layer.in_units < 0, self.num_units, layer.in_units)
            self.module.register_buffer(name, places, persistent=False)
            graph = self.module.graph
            with graph.inserting_after(self.padded):
                units = graph.get_attr(name)
            with graph.inserting_after(units):
                self.made[key] = graph.call_function(torch.ops.aten.index_select.default, (self.padded, 0, units))
        return self.made[key]


def insert_gate(module: GraphModule, source: Node, gates: Node, channel_dim: int, rank: int) -> Node:
    """Multiply ``source`` by the gates of its channels."""
    shape = [1] * rank
    shape[channel_dim] = -1
    viewed = module.graph.call_function(torch.ops.aten.view.default, (gates, shape))
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
