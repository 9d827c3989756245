"""Sub-networks that run on slices of a network's own weights: nothing is copied, and training them trains the network.

A sub-network keeps some units of a traced network. Its graph is rewritten for them as surgery does it, and each of its
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
from torch.fx import GraphModule, Node
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
from fastprune.networks.masked import make_out_of_place, share_tensors
from fastprune.networks.prefixes import use_kernels

# Operators that are written the same way for any number of channels.
WIDTHLESS = {
    *("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "add", "mul", "cat", "dropout"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean"),
    *ACTIVATIONS,
}
REMEMBERED = 8  # rewritten graphs, the least recently used goes first

BATCH_NORM = torch.ops.aten.batch_norm.default
DROPOUT = torch.ops.aten.dropout.default


class SubNetworks:
    """The sub-networks of a network, on its own parameters.

    Batch norms take the statistics of the batch, for which the running ones of the full network say nothing, and leave
    those as they are. Dropout is off.

    Args:
        graph: the traced network.
        model: the model that was traced; its tensors are used where they are, so that gradients arrive in them.

    Shapes:
        ``networks(*inputs, mask=mask [U])`` returns what the model would return with the units that the mask keeps.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        traced = graph.traced.evaluation
        self.source = GraphModule(traced, copy.deepcopy(traced.graph))
        self._overwrites = make_out_of_place(self.source)
        share_tensors(model, self.source)
        state = Propagation(exact=False, rewrites=graph.rewrites)
        self._labels = run_on_labels(self.source, graph.traced.inputs, state, record=True)
        self._selections = state.selections
        self._unit_of_label = unit_of_label(graph, state)
        use_batch_statistics(self.source, update=False)
        self._arrangements: dict[bytes, IntArray] = {}  # of units along a dimension; few for many tensors
        self._pieces: dict[str, list[tuple[int, bytes]]] = {}  # of each tensor: dimensions and arrangements
        for piece in graph.slices:
            units = piece.units.numpy()
            self._arrangements[units.tobytes()] = units
            self._pieces.setdefault(piece.tensor, []).append((piece.dim, units.tobytes()))
        sliced = [node for node in self.source.graph.nodes if node.op == "call_function" and self.reads_units(node)]
        self._one_for_all = not any(node in self._selections or not is_widthless(node) for node in sliced)
        self._written: OrderedDict[bytes, RewrittenGraph] = OrderedDict()
        self._convs: dict[Any, nn.Module] | None = None

    def __call__(self, *inputs: Any, mask: Tensor) -> Any:
        """The outputs of the sub-network of ``mask`` [U], bool on the CPU."""
        written = self.written(mask)
        kept = self.kept(mask)
        tensors = [self.slice(name, kept) for name in written.tensors]
        indices = [index.to(tensors[0].device) for index in written.indices]
        with restore_modes():
            return pytree.tree_unflatten(written.module(*inputs, *tensors, *indices), written.results)

    def frozen(self) -> SubNetworks:
        """The same sub-networks, faster without gradients: what does not change with the widths is made once.

        Weights may change; what is made of them is then made again, but not where they change through ``.data``.
        """
        found = copy.copy(self)
        if not self._overwrites:
            found._written, found._convs = OrderedDict(), {}
        return found

    def written(self, mask: Tensor) -> RewrittenGraph:
        """The graph of a sub-network; one for all of them where nothing in it depends on the number of channels."""
        key = b"" if self._one_for_all else mask.numpy().tobytes()
        if key not in self._written:
            keep = np.append(mask.numpy(), True)[self._unit_of_label]  # of labels that belong to no unit: True
            made = rewrite(self.source, self._labels, self._selections, keep)
            if self._convs is not None:
                use_kernels(made, self.source, self._convs)
            self._written[key] = made
            if len(self._written) > REMEMBERED:
                self._written.popitem(last=False)
        self._written.move_to_end(key)
        return self._written[key]

    def reads_units(self, node: Node) -> bool:
        """Whether a node reads or makes channels that may go."""
        values = [self._labels.get(touched) for touched in (node, *node.all_input_nodes)]
        labels = [x for x in pytree.tree_leaves(values) if isinstance(x, (Tensor, Computed))]
        parts = [part for x in labels for part in (x.parts if isinstance(x, Computed) else (x,))]
        return any(bool((self._unit_of_label[core(part).numpy()] >= 0).any()) for part in parts)

    def kept(self, mask: Tensor) -> dict[bytes, IntArray]:
        """The indices that stay, ascending, for each arrangement of units."""
        stays = np.append(mask.numpy(), True)  # the last is -1, what belongs to no unit
        return {key: np.flatnonzero(stays[units]) for key, units in self._arrangements.items()}

    def slice(self, name: str, kept: Mapping[bytes, IntArray]) -> Tensor:
        """A tensor of the network with the indices that stay; a view of it where they lie next to each other."""
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
    """Whether a node would be the same for any number of channels; a depthwise convolution has its number of groups."""
    grouped = "conv" in operator_name(node) and argument_of(node, "groups") != 1
    return operator_name(node) in WIDTHLESS and not grouped


def unit_of_label(graph: ChannelGraph, state: Propagation) -> IntArray:
    """The unit of each label of a graph that was run on labels, -1 for those that belong to none."""
    components, _ = state.settle()
    unit_of_class = np.full(len(components), -1)
    for piece in graph.slices:
        unit_of_class[components[state.dims[piece.place].labels.numpy()]] = piece.units.numpy()
    found: IntArray = unit_of_class[components]
    return found


def use_batch_statistics(module: GraphModule, *, update: bool) -> None:
    """Let the batch norms of an eval-mode graph use the statistics of the batch.

    Args:
        module: the graph, changed in place.
        update: whether they bring their running statistics up to date, as in training; dropout is on then, too.
    """
    for node in module.graph.nodes:
        if node.target is BATCH_NORM:
            for place in (3, 4) if not update else ():
                node.update_arg(place, None)
            node.update_arg(5, True)
        elif node.target is DROPOUT and update:
            node.update_arg(2, True)
    module.graph.eliminate_dead_code()
    module.recompile()
