"""The masked network: the traced graph with a gate in front of everything that reads a prunable channel.

Two graphs compute it. In one each convolution is a call together with its batch norm, activation and the gates of what
it reads (``fusion``). It serves while nothing but gates is trained. The other has torch's operators with gates between
them, for ``torch.compile``, and for training weights.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph, Layer
from fastprune.graph.export.regions import GRADIENTS, restore_modes
from fastprune.graph.norms import Use, uses_of
from fastprune.graph.structure import Norm, belong_to
from fastprune.networks.chains import find_chains
from fastprune.networks.fusion import fuse, is_fusable
from fastprune.networks.traced_copy import (
    copy_traced,
    let_views_copy,
    make_out_of_place,
    return_flat,
    share_tensors,
    version,
)

GATE = "fastprune_gate"  # key of a node's metadata


class MaskedNetwork(nn.Module):
    """A network whose prunable channels pass through gates, in eval mode and with the model's own parameters.

    A gate sits at the input of whatever reads the channels, after the activation, so that a gate of 0 does exactly what
    removing the channel does. A depthwise convolution's input is gated as well, as in DMC and DDNP: the same vector
    gates its input and its output. Batch norm uses its running statistics and never updates them.

    While no parameter requires gradients, convolutions run fused and in channels_last. Their weights are folded once,
    and again when the parameters have changed; a write through ``parameter.data`` is not noticed.

    Norms that count removed channels as zeros (``trace(replace_norms=True)``) have a gate in front of them, too.

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
        self.signature = inspect.signature(model.forward)
        self.any_batch = graph.traced.any_batch
        self.batch = graph.traced.inputs.batch
        codegen: Any = graph.traced.evaluation.graph._codegen
        self.out_spec: pytree.TreeSpec = codegen.pytree_info.out_spec
        units = torch.ones(graph.num_units, dtype=torch.bool) if units is None else units.cpu()
        self.network = build_gated_graph(graph, units, fused=False)
        self.fused = build_gated_graph(graph, units, fused=True)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for network in (self.network, self.fused):
            share_tensors(model, network)
            network.to(device)
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._batches_seen: dict[int, Any] = {}
        self.train(False)

    def train(self, mode: bool = True) -> MaskedNetwork:
        """Stay in eval mode: the exported graph has batch norm frozen and dropout off."""
        self.training = False
        return self

    def forward(self, *inputs: Any) -> Any:
        """Return the network's outputs; the last argument is the flat vector of gates [U]."""
        *images, gates = inputs
        if gates.shape != (self.num_units,):
            raise ValueError(f"gates: got shape {tuple(gates.shape)}; a vector of {self.num_units} units is needed")
        if not self.any_batch and images[0].shape[0] != self.batch:
            raise ValueError(
                f"images: got a batch of {images[0].shape[0]}; this model could only be traced for batches of "
                f"{self.batch}; trace it with an example of the batch size that is used"
            )
        network = self.network
        if self.runs_fused():
            network = self.fused
            self.note_new_statistics()
        with restore_modes():
            return pytree.tree_unflatten(network(*images, gates), self.out_spec)

    @torch.no_grad()
    def energies(self, *images: Tensor) -> Tensor:
        """Measure how strong the features of each unit are with all gates open.

        Args:
            images: what the network reads, [N, C, H, W].

        Returns:
            The mean square, over batch and positions, of what the unit's readers see, averaged over the readers, [U];
            0 for units that have no gate.
        """
        return self.run_energies(images)[0]

    def run_energies(self, images: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Return the energies, and the network's outputs."""
        gates = torch.ones(self.num_units, device=images[0].device)
        energies = _Energies(self.network, gates)
        with restore_modes():
            outputs = energies.run(*images, gates)
        return energies.sums / energies.counts.clamp(min=1), pytree.tree_unflatten(outputs, self.out_spec)

    def under(self, gates: Tensor) -> GatedCall:
        """Return the network under gates [U], to be called as the model is: inputs by position or by name."""
        return GatedCall(self, gates)

    def in_order(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """Return inputs of the model by position, in the order of its signature."""
        return tuple(self.signature.bind(*args, **kwargs).arguments.values()) if kwargs else args

    def note_new_statistics(self) -> None:
        """Give statistics a new version where batch norms have seen batches since the last call.

        Torch updates them in place without a new version, unlike everything else that is written into.
        """
        for number, norm in enumerate(self._norms):
            seen = norm.num_batches_tracked
            now = seen if seen is None else version(seen)
            if self._batches_seen.setdefault(number, now) != now:
                self._batches_seen[number] = now
                increment_version([t for t in (norm.running_mean, norm.running_var) if t is not None])

    def runs_fused(self) -> bool:
        """Return whether convolutions run fused now: outside of ``torch.compile``, if no parameter wants a gradient."""
        if torch.compiler.is_compiling():
            return False
        return not torch.is_grad_enabled() or not any(p.requires_grad for p in self.network.parameters())


@dataclass(frozen=True)
class GatedCall:
    """A masked network under fixed gates, which is called as the model is.

    Args:
        masked: the network.
        gates: the gates, [U].
    """

    masked: MaskedNetwork
    gates: Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's outputs."""
        return self.masked(*self.masked.in_order(args, kwargs), self.gates)


@dataclass
class EnergyMeter:
    """A masked network with open gates, which is called as the model is and keeps the energies that it measures.

    Args:
        masked: the network.
        energies: the sum of the energies of all calls, [U].
    """

    masked: MaskedNetwork
    energies: Tensor | float = 0.0

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Measure; return the network's outputs."""
        energies, outputs = self.masked.run_energies(self.masked.in_order(args, kwargs))
        self.energies = self.energies + energies
        return outputs


class _Energies(torch.fx.Interpreter):
    """Executes a gated graph and adds up what its gates let through."""

    def __init__(self, network: GraphModule, gates: Tensor) -> None:
        super().__init__(network)
        self.sums, self.counts = torch.zeros_like(gates), torch.zeros_like(gates)

    def run_node(self, n: Node) -> Any:
        """Return the node's value; that of a gate is counted."""
        value = super().run_node(n)
        if GATE in n.meta:
            units, dim = n.meta[GATE]
            squares = value.float().square().transpose(0, dim).flatten(1).mean(1)
            has_gate = units >= 0
            places = units[has_gate].to(self.sums.device)
            self.sums.index_add_(0, places, squares[has_gate.to(squares.device)])
            self.counts.index_add_(0, places, torch.ones_like(squares[: len(places)]))
        return value


def build_gated_graph(graph: ChannelGraph, units: Tensor, *, fused: bool) -> GraphModule:
    """Copy the traced graph, with the gates as one more input.

    Args:
        graph: the traced network.
        units: which of its units have a gate, bool [U].
        fused: whether convolutions are fused; they are not where something is overwritten that others read.
    """
    module = copy_traced(graph)
    readers = {node.name: node for node in module.graph.nodes}
    for node in reversed(list(module.graph.nodes)):
        if node.target in GRADIENTS:  # these would hide a gate's gradient
            module.graph.erase_node(node)
    return_flat(module)
    overwrites = make_out_of_place(module)
    gates = Gates(module, graph.num_units, on_copies=overwrites)
    chains = find_chains(module, is_fusable) if fused and not overwrites else []
    vectors: dict[Node, Node | None] = {chain.first: None for chain in chains}
    insertions: list[tuple[Node, Callable[[], None]]] = []
    for layer in graph.layers:
        reader = readers[layer.node]
        if not bool(belong_to(layer.in_units, units).any()):
            continue
        if reader in vectors:
            vectors[reader] = gates.vector(layer.in_units)
        else:
            insertions.append((reader, partial(gates.insert, layer, reader)))
    norms = {norm.module: norm for norm in graph.norms if bool(belong_to(norm.units, units).any())}
    for name, uses in uses_of(module, norms).items():
        insertions += [(use.nodes[0], partial(gates.insert_at_norm, norms[name], use)) for use in uses]
    for _, insert in sorted(insertions, key=lambda pair: pair[0]):  # a gate goes to the first of its readers
        insert()
    if chains:
        let_views_copy(module)
        fuse(module, chains, vectors)
    module.graph.lint()
    module.recompile()
    return module


class Gates:
    """Inserts gates into a graph, which gets their values as its last input.

    Args:
        module: the graph, changed in place.
        num_units: U.
        on_copies: whether each reader has a gate of its own, on a copy of what it reads: where values are overwritten.
    """

    def __init__(self, module: GraphModule, num_units: int, *, on_copies: bool) -> None:
        self.module, self.num_units, self.on_copies = module, num_units, on_copies
        self._vectors: dict[bytes, Node] = {}
        self._inserted: dict[Any, Node] = {}
        graph = module.graph
        with graph.inserting_after([node for node in graph.nodes if node.op == "placeholder"][-1]):
            gates = graph.placeholder("gates")
        with graph.inserting_after(gates):
            one = graph.call_function(torch.ops.aten.new_ones.default, (gates, [1]))
        with graph.inserting_after(one):  # the last place: always open
            self._padded = graph.call_function(torch.ops.aten.cat.default, ([gates, one],))

    def vector(self, read: Tensor) -> Node:
        """Return the node of the gates of the channels whose units are ``read``, [channels]."""
        key = read.numpy().tobytes()
        if key not in self._vectors:
            name = f"_units_{len(self._vectors)}"
            places = torch.where(read < 0, self.num_units, read)
            self.module.register_buffer(name, places, persistent=False)
            graph = self.module.graph
            with graph.inserting_after(self._padded):
                units = graph.get_attr(name)
            with graph.inserting_after(units):
                self._vectors[key] = graph.call_function(torch.ops.aten.index_select.default, (self._padded, 0, units))
        return self._vectors[key]

    def insert(self, layer: Layer, reader: Node) -> None:
        """Multiply what the node of a layer reads by the gates of its channels."""
        reader.update_arg(0, self.gate(cast("Node", reader.args[0]), reader, layer.in_units, layer.channel_dim))

    def insert_at_norm(self, norm: Norm, use: Use) -> None:
        """Multiply what a norm reads by the gates of its channels, so that they count in its statistics as they are."""
        source = use.source
        assert source is not None  # otherwise none of its channels has a unit
        dim = norm.dim % len(source.meta["val"].shape)
        gate = self.gate(source, use.readers[0][0], norm.units, dim)
        for reader, _ in use.readers:
            reader.replace_input_with(source, gate)

    def gate(self, source: Node, reader: Node, read: Tensor, dim: int) -> Node:
        """Return what ``reader`` gets of a node: its channels along ``dim`` times the gates of their units ``read``."""
        vector = self.vector(read)
        key = (source, dim, vector, reader.name if self.on_copies else "")
        if key not in self._inserted:
            with self.module.graph.inserting_before(reader):
                self._inserted[key] = gate = self.multiply(source, vector, dim)
            gate.meta[GATE] = read, dim
        return self._inserted[key]

    def multiply(self, source: Node, gates: Node, channel_dim: int) -> Node:
        """Return the node of ``source`` times the gates of its channels."""
        graph, aten = self.module.graph, torch.ops.aten
        shape = [1] * len(source.meta["val"].shape)
        shape[channel_dim] = -1
        value = graph.call_function(aten.clone.default, (source,)) if self.on_copies else source
        viewed = graph.call_function(aten.view.default, (gates, shape))
        typed = graph.call_function(aten.type_as.default, (viewed, value))
        return graph.call_function(operator.mul, (value, typed))
