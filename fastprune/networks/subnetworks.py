"""Sub-networks that run on slices of a network's own weights: nothing is copied, and training them trains the network.

A sub-network keeps some units of a traced network. Its graph is rewritten for them as in surgery. Each of its
parameters is a view of the network's where the units that stay lie next to each other, as the first n always do.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph
from fastprune.graph.export.nodes import argument_of, operator_name
from fastprune.graph.export.regions import restore_modes
from fastprune.graph.interior import ACTIVATIONS
from fastprune.graph.labels.interpret import run_on_labels
from fastprune.graph.labels.labels import IntArray, core
from fastprune.graph.labels.propagate import Computed, Propagation
from fastprune.graph.model_state import attribute_of
from fastprune.graph.rewrite import RewrittenGraph, rewrite
from fastprune.networks.prefixes import use_kernels
from fastprune.networks.traced_copy import copy_traced, make_out_of_place, share_tensors, use_batch_statistics

# Operators with the same arguments for any number of channels.
WIDTHLESS = {
    *("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "add", "mul", "cat", "dropout"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean"),
    *ACTIVATIONS,
}
REMEMBERED = 8  # rewritten graphs; the least recently used goes first


class SubNetworks:
    """The sub-networks of a network, on its own parameters.

    Batch norms take the statistics of the batch, as the running ones of the full network say nothing of a sub-network;
    they do not change the running ones. Dropout is off.

    Args:
        graph: the traced network.
        model: the model that was traced; its tensors are used in place, so that they receive the gradients.

    Shapes:
        ``networks(*inputs, mask=mask [U])`` returns what the model would return with the units that the mask keeps.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.source = copy_traced(graph)
        self._overwrites = make_out_of_place(self.source)
        share_tensors(model, self.source)
        # These graphs are rewritten, also where the model's own code is to be kept.
        state = Propagation(exact=False, norms={norm.module for norm in graph.norms}, heads=graph.heads)
        self._labels = run_on_labels(self.source, graph.traced.inputs, state, record=True)
        self._selections = state.selections
        self._unit_of_label = unit_of_label(graph, state)
        use_batch_statistics(self.source, update=False)
        self._arrangements: dict[bytes, IntArray] = {}  # of units along a dimension; few for many tensors
        self._pieces: dict[str, list[tuple[int, bytes]]] = {}  # {tensor: its dimensions and their arrangements}
        for piece in graph.slices:
            units = piece.units.numpy()
            self._arrangements[units.tobytes()] = units
            self._pieces.setdefault(piece.tensor, []).append((piece.dim, units.tobytes()))
        sliced = [node for node in self.source.graph.nodes if node.op == "call_function" and self.reads_units(node)]
        self._one_for_all = not any(node in self._selections or not is_widthless(node) for node in sliced)
        self._rewritten: OrderedDict[bytes, RewrittenGraph] = OrderedDict()
        self._convs: dict[Any, nn.Module] | None = None  # for our own kernels

    def __call__(self, *inputs: Any, mask: Tensor) -> Any:
        """Return the outputs of the sub-network of ``mask`` [U], bool on the CPU."""
        rewritten = self.rewrite_for(mask)
        kept = self.kept_indices(mask)
        tensors = [self.slice_tensor(name, kept) for name in rewritten.tensors]
        indices = [index.to(tensors[0].device) for index in rewritten.indices]
        with restore_modes():
            return pytree.tree_unflatten(rewritten.module(*inputs, *tensors, *indices), rewritten.results)

    def freeze(self) -> SubNetworks:
        """Return the same sub-networks, faster without gradients: what does not change with the widths is made once.

        Weights may change; what was made of them is then made again, except after a change through ``.data``.
        """
        found = copy.copy(self)
        if not self._overwrites:
            found._rewritten, found._convs = OrderedDict(), {}
        return found

    def rewrite_for(self, mask: Tensor) -> RewrittenGraph:
        """Return the graph of a sub-network; one for all where nothing in it depends on the number of channels."""
        key = b"" if self._one_for_all else mask.numpy().tobytes()
        if key not in self._rewritten:
            keep = np.append(mask.numpy(), True)[self._unit_of_label]  # True for labels that belong to no unit
            rewritten = rewrite(self.source, self._labels, self._selections, keep, self.graph.norms)
            if self._convs is not None:
                use_kernels(rewritten, self.source, self._convs)
            self._rewritten[key] = rewritten
            if len(self._rewritten) > REMEMBERED:
                self._rewritten.popitem(last=False)
        self._rewritten.move_to_end(key)
        return self._rewritten[key]

    def reads_units(self, node: Node) -> bool:
        """Return whether a node reads or makes channels that may go."""
        values = [self._labels.get(touched) for touched in (node, *node.all_input_nodes)]
        labels = [x for x in pytree.tree_leaves(values) if isinstance(x, (Tensor, Computed))]
        parts = [part for x in labels for part in (x.parts if isinstance(x, Computed) else (x,))]
        return any(bool((self._unit_of_label[core(part).numpy()] >= 0).any()) for part in parts)

    def kept_indices(self, mask: Tensor) -> dict[bytes, IntArray]:
        """Return the indices that stay, ascending, for each arrangement of units."""
        stays = np.append(mask.numpy(), True)  # the last place is that of -1: channels that belong to no unit
        return {key: np.flatnonzero(stays[units]) for key, units in self._arrangements.items()}

    def slice_tensor(self, name: str, kept: Mapping[bytes, IntArray]) -> Tensor:
        """Return the part of a tensor that stays; a view of it where the indices lie next to each other."""
        tensor: Tensor = attribute_of(self.source, name)
        for dim, arrangement in self._pieces.get(name, []):
            indices = kept[arrangement]
            first, last = int(indices[0]), int(indices[-1])
            if last - first + 1 == len(indices):
                tensor = tensor.narrow(dim, first, len(indices))
            else:
                tensor = tensor.index_select(dim, torch.from_numpy(indices).to(tensor.device))
        return tensor


def is_widthless(node: Node) -> bool:
    """Return whether a node is the same for any number of channels; a depthwise convolution holds its groups."""
    grouped = "conv" in operator_name(node) and argument_of(node, "groups") != 1
    return operator_name(node) in WIDTHLESS and not grouped


def unit_of_label(graph: ChannelGraph, state: Propagation) -> IntArray:
    """Return the unit of each label of a graph that was run on labels, -1 for labels that belong to none."""
    components, _ = state.settle()
    unit_of_class = np.full(len(components), -1)
    for piece in graph.slices:
        known = state.dims.get(piece.place)
        if known is not None:  # an auxiliary head of train mode is not in the graph of eval mode
            unit_of_class[components[known.labels.numpy()]] = piece.units.numpy()
    found: IntArray = unit_of_class[components]
    return found
