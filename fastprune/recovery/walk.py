"""The walk through a traced graph, node by node: all calibration batches pass a node before the next one computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph
from fastprune.graph.export.regions import MODES
from fastprune.graph.model_state import attribute_of, device_of, state_of
from fastprune.graph.norms import uses_of
from fastprune.graph.plan import PruningPlan
from fastprune.networks.traced_copy import copy_traced, make_out_of_place, return_flat
from fastprune.recovery.room import Room


class Values:
    """The values of one network at the nodes of a graph, for every batch; a value goes when nothing more reads it.

    Args:
        module: the graph.
        model: the model whose tensors the graph computes with; they may change during the walk.
        batches: the inputs of each batch.
        room: the memory that values may take.
        closed: {node of a norm: (what it reads, the dimension of the channels, those that are read as zeros)}.
    """

    def __init__(
        self,
        module: GraphModule,
        model: nn.Module,
        batches: Sequence[Sequence[Tensor]],
        room: Room,
        closed: Mapping[Node, tuple[Node, int, Tensor]] | None = None,
    ) -> None:
        self.module, self.tensors, self.room, self.closed = module, state_of(model), room, closed or {}
        self.at: dict[Node, list[Any]] = {}
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        for place, node in enumerate(places):
            self.at[node] = [inputs[place] for inputs in batches]
        self.count = len(batches)

    def fetch(self, node: Node, batch: int) -> Any:
        """Return the value of a node for a batch."""
        if node.op != "get_attr":
            return self.room.fetch(self.at[node][batch])
        name = str(node.target)
        return self.tensors[name] if name in self.tensors else attribute_of(self.module, name)

    def argument(self, node: Node, batch: int) -> Tensor:
        """Return the value of a node's first argument."""
        source = node.args[0]
        assert isinstance(source, Node)
        value: Tensor = self.fetch(source, batch)
        return value

    def run(self, node: Node) -> None:
        """Compute a node for all batches."""
        results = []
        for batch in range(self.count):
            args, kwargs = pytree.tree_map_only(Node, lambda n: self.read(n, node, batch), (node.args, node.kwargs))  # noqa: B023
            results.append(self.room.place(node.target(*args, **kwargs)))  # type: ignore[operator]
        self.at[node] = results

    def read(self, source: Node, node: Node, batch: int) -> Any:
        """Return the value of ``source`` as ``node`` reads it."""
        value = self.fetch(source, batch)
        read, dim, channels = self.closed.get(node, (None, 0, None))
        if source is not read or channels is None:
            return value
        return value.index_fill(dim, channels.to(value.device), 0.0)

    def drop(self, nodes: Sequence[Node]) -> None:
        """Forget values."""
        for node in nodes:
            self.at.pop(node, None)


class Walk:
    """Two networks of one structure at the same nodes: the full one, and the one that is changed on the way.

    Where nothing in front of a node was changed, both share one value.

    Args:
        graph: the traced network.
        full: the full model.
        other: the model that changes; None = there is the full one only.
        batches: the inputs of each batch.
        memory: GiB that values may take in memory, see ``Room``.
        room: the room of an earlier walk through this graph, in place of ``memory``; it tells once that it is full.
        plan: closes channels in front of the norms of the model that changes, see ``PruningPlan.norms``.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        full: nn.Module,
        other: nn.Module | None,
        batches: Sequence[Sequence[Tensor]],
        memory: float | None = None,
        *,
        room: Room | None = None,
        plan: PruningPlan | None = None,
    ) -> None:
        module = copy_traced(graph)
        return_flat(module)
        self.shares = not make_out_of_place(module)  # a shared value must not be overwritten
        self.nodes = list(module.graph.nodes)
        self.room = room or Room(device_of(full), memory, fixed=not self.shares)
        self.full = Values(module, full, batches, self.room)
        self.closed = {} if plan is None else closed_in_norms(module, plan)
        self.other = None if other is None else Values(module, other, batches, self.room, self.closed)
        if self.other is not None and not self.shares:
            self.other.at = {node: [x.clone() for x in values] for node, values in self.full.at.items()}
        self.changed: set[str] = set()
        self._last = last_uses(self.nodes)
        self._differs: set[Node] = set()

    def steps(self) -> Iterator[Node]:
        """Yield each node that computes something, before it runs; it runs when the next one is asked for."""
        for node in self.nodes:
            if node.op == "output":
                return
            if node.op == "call_function":
                if node.target in MODES:
                    self.switch(node)
                else:
                    yield node
                    self.run(node)
            for values in (self.full, self.other):
                if values is not None:
                    values.drop(self._last.get(node, ()))

    def switch(self, node: Node) -> None:
        """Enter or leave a mode, once for all batches and both networks."""
        count, self.full.count = self.full.count, 1
        try:
            self.full.run(node)
        finally:
            self.full.count = count
        self.full.at[node] *= count
        if self.other is not None:
            self.other.at[node] = self.full.at[node]

    def run(self, node: Node) -> None:
        """Compute a node in both networks."""
        self.room.count(x for values in (self.full, self.other) if values is not None for x in values.at.values())
        self.full.run(node)
        if self.other is None:
            return
        if self.differs(node):
            self._differs.add(node)
            self.other.run(node)
        else:
            self.other.at[node] = self.full.at[node]

    def differs(self, node: Node) -> bool:
        """Return whether a node may compute another value in the other network."""
        if not self.shares or node in self.closed:
            return True
        return any(
            source in self._differs or (source.op == "get_attr" and str(source.target) in self.changed)
            for source in node.all_input_nodes
        )

    def has_changed(self, node: Node) -> bool:
        """Return whether a node that was computed may have another value in the other network."""
        return not self.shares or node in self._differs

    @property
    def fitted(self) -> Values:
        """The values that fits take as inputs: the other network's, if there is one."""
        return self.other or self.full


def closed_in_norms(module: GraphModule, plan: PruningPlan) -> dict[Node, tuple[Node, int, Tensor]]:
    """Return {node of a norm: (what it reads, the dimension of the channels, those that the plan removes)}."""
    norms = {norm.module: norm for norm in plan.narrowed_norms()}
    found = {}
    for name, uses in uses_of(module, norms).items():
        closed = torch.ones(len(norms[name].units), dtype=torch.bool)
        closed[plan.kept_indices(norms[name])] = False
        for node, source in (pair for use in uses for pair in use.readers):
            found[node] = source, norms[name].dim, closed.nonzero().flatten()
    return found


def last_uses(nodes: Sequence[Node]) -> Mapping[Node, list[Node]]:
    """Map each node to the nodes whose values nothing reads after it."""
    seen: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(nodes):
        for source in (*node.all_input_nodes, node):
            if source not in seen:
                seen.add(source)
                last.setdefault(node, []).append(source)
    return last
