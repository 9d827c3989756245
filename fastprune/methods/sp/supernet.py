"""The super-net of SP: a network cut into stages, each of which can run on slices of its weights by itself.

A sub-network of one stage reads the full network's features at the stage's beginning, and its own features, brought to
full width by a 1×1 convolution (an adaptor), are compared with the full network's at the stage's end. So the stages can
be trained and searched apart from each other.

Source: Zhang and Ou, SP, §3.2 and eq. 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph, trace
from fastprune.graph.export.nodes import concrete
from fastprune.graph.export.regions import restore_modes
from fastprune.graph.model_state import attribute_of, state_of
from fastprune.graph.stages import Stage
from fastprune.graph.structure import index_slices
from fastprune.networks.subnetworks import SubNetworks
from fastprune.networks.traced_copy import (
    copy_traced,
    make_out_of_place,
    return_flat,
    share_tensors,
    use_batch_statistics,
)

ADAPTOR = "stage_adaptor"


class SuperNet:
    """A network, and the sub-networks of its stages on slices of its weights.

    Args:
        graph: the traced network.
        model: the model that was traced; its parameters are the super-net's.
        stages: of the graph.
        seed: of the adaptors' initial weights; the global generator is left alone.

    Raises:
        ValueError: where a stage reads something else of the network than its features; where a batch norm has a
            cumulative average.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, stages: Sequence[Stage], seed: int = 0) -> None:
        self.graph, self.stages = graph, tuple(stages)
        self.norms = [norm for norm in model.modules() if isinstance(norm, _NormBase) and norm.track_running_stats]
        for name, norm in model.named_modules():
            if norm in self.norms and norm.momentum is None:
                raise ValueError(f"{name}: a batch norm of cumulative statistics (momentum None) is not supported here")
        self.training_graph = with_features(graph, model, stages, training=True)
        self.evaluation_graph = with_features(graph, model, stages, training=False)
        codegen: Any = graph.traced.evaluation.graph._codegen
        self.out_spec: pytree.TreeSpec = codegen.pytree_info.out_spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adaptors = nn.ModuleList(adaptor(stage, model) for stage in stages)
        self.parts = [
            StageNetwork(graph, model, stage, cast("nn.Conv2d", fitted))
            for stage, fitted in zip(stages, self.adaptors, strict=True)
        ]

    def full(self, images: Tensor) -> tuple[list[Tensor], Any]:
        """The full network in train mode: what each stage reads and gives on, and the network's outputs.

        Its batch norms bring their running statistics up to date.

        Returns:
            Features, detached, one more than there are stages; and what the model returns.
        """
        with restore_modes():
            results = self.training_graph(images)
        count = len(self.stages)
        for norm in self.norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        features = [images, *(x.detach() for x in results[:count])]
        return features, pytree.tree_unflatten(results[count:], self.out_spec)

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """What each stage of the full network reads and gives on, with the statistics of this batch, dropout off."""
        with restore_modes():
            results = self.evaluation_graph(images)
        return [images, *results[: len(self.stages)]]

    def distance(self, number: int, features: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Eq. 7 for the sub-network of one stage: mean over batch, channels and pixels of |A(stage(x)) − y|².

        Args:
            number: of the stage.
            features: x, what the full network gives the stage, [N, C, H, W].
            target: y, what the full network's stage makes of it.
            mask: units that stay, bool [U] on the CPU; those of other stages do not matter.
        """
        return F.mse_loss(self.parts[number](features, mask).float(), target.float())


class StageNetwork:
    """The sub-networks of one stage, with its adaptor.

    Args:
        graph: the traced network.
        model: the model that was traced.
        stage: which part.
        fitted: the adaptor.

    Shapes:
        ``network(features [N, C, H, W], mask [U])`` returns features [N, C', H', W'] of the stage's full width.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, stage: Stage, fitted: nn.Conv2d) -> None:
        network, shape = cut_out(graph, model, stage, fitted)
        device = fitted.weight.device
        example = torch.zeros(shape, device=device, dtype=fitted.weight.dtype)
        own = trace(network, example, rewrite=graph.rewrites, exact=graph.exact)
        self.slices = SubNetworks(own, network)
        self.unit = units_in(graph, own, stage)

    def __call__(self, features: Tensor, mask: Tensor) -> Tensor:
        """The stage's features; ``mask`` [U] is that of the whole network."""
        return cast("Tensor", self.slices(features, mask=self.own_mask(mask)))

    def own_mask(self, mask: Tensor) -> Tensor:
        """The mask of a whole network, [U], as one over the units of the stage's own graph."""
        return torch.cat([mask, torch.ones(1, dtype=torch.bool)])[self.unit]


def adaptor(stage: Stage, model: nn.Module) -> nn.Conv2d:
    """A 1×1 convolution from a stage's features to themselves, random; its inputs are sliced with the features."""
    like = next(model.parameters())
    with torch.device("cpu"):
        made = nn.Conv2d(stage.channels, stage.channels, 1)
    return made.to(like)


def units_in(graph: ChannelGraph, own: ChannelGraph, stage: Stage) -> Tensor:
    """For each unit of a stage's own graph its unit in the network's, −1 for those that always stay.

    Raises:
        ValueError: where a group that the stage decides on cannot lose channels in it; names the group.
    """
    whole = index_slices(graph.slices)
    decided = torch.zeros(graph.num_units + 1, dtype=torch.bool)
    for number in stage.groups:
        decided[graph.groups[number].units] = True
    unit = torch.full((own.num_units,), graph.num_units)
    for piece in own.slices:
        inside = piece.units >= 0
        if piece.tensor.startswith(f"{ADAPTOR}."):
            continue
        known = whole.get(piece.place)
        unit[piece.units[inside]] = known.units[inside] if known is not None else -1
    found = torch.where((unit < graph.num_units) & decided[unit], unit, -1)
    for number in stage.groups:
        group = graph.groups[number]
        if not bool(torch.isin(torch.arange(group.start, group.start + group.size), found).all()):
            raise ValueError(
                f"stage {stage.name!r}: channels of {group.name!r} cannot leave it alone; give other stages"
            )
    return found


def with_features(graph: ChannelGraph, model: nn.Module, stages: Sequence[Stage], *, training: bool) -> GraphModule:
    """The network's graph with batch statistics; it returns the features at the ends of stages, then the outputs.

    Args:
        graph: the traced network.
        model: the model that was traced, whose tensors it uses.
        stages: of the graph.
        training: whether running statistics are brought up to date, and dropout is on.
    """
    module = copy_traced(graph)
    return_flat(module)
    overwrites = make_out_of_place(module)
    nodes = {node.name: node for node in module.graph.nodes}
    features = [nodes[stage.end] for stage in stages]
    if overwrites:  # what is written to them later must not be seen
        for place, node in enumerate(features):
            with module.graph.inserting_after(node):
                features[place] = module.graph.call_function(torch.ops.aten.clone.default, (node,))
    output = next(iter(module.graph.find_nodes(op="output")))
    output.args = ((*features, *pytree.tree_leaves(output.args[0])),)
    use_batch_statistics(module, update=training)
    share_tensors(model, module)
    return module


def cut_out(
    graph: ChannelGraph, model: nn.Module, stage: Stage, fitted: nn.Conv2d
) -> tuple[GraphModule, tuple[int, ...]]:
    """A stage with its adaptor as a network of its own, on the model's tensors, and the shape of its input.

    Raises:
        ValueError: where it reads something else of the network than its features, or overwrites what it reads.
    """
    whole = copy_traced(graph)
    if make_out_of_place(whole):
        raise ValueError("super-net: this network writes to parts of tensors, so that its stages cannot run apart")
    nodes = {node.name: node for node in whole.graph.nodes}
    start, end = nodes[stage.start], nodes[stage.end]
    needed = between(start, end, stage)
    inner = Graph()
    features = inner.placeholder("features")
    written: dict[Node, Any] = {start: features}
    for node in whole.graph.nodes:
        if node in needed:
            size = node.args[1] if is_size(node) and node.args[0] not in needed else None
            if size is None:
                written[node] = inner.node_copy(node, written.__getitem__)
            elif size == 0:  # the batch, the one size that is the same everywhere
                written[node] = inner.call_function(torch.ops.aten.sym_size.int, (features, 0))
            else:
                written[node] = concrete(node.meta["val"])
    weight, bias = (inner.get_attr(f"{ADAPTOR}.{name}") for name in ("weight", "bias"))
    inner.output(inner.call_function(torch.ops.aten.conv2d.default, (written[end], weight, bias)))
    own = state_of(model) | {f"{ADAPTOR}.{name}": tensor for name, tensor in fitted.named_parameters()}
    names = {str(node.target) for node in inner.find_nodes(op="get_attr")}
    module = GraphModule({name: own[name] if name in own else attribute_of(whole, name) for name in names}, inner)
    return module.eval(), tuple(concrete(size) for size in start.meta["val"].shape)


def between(start: Node, end: Node, stage: Stage) -> set[Node]:
    """The nodes that make the value of ``end`` from that of ``start``.

    Raises:
        ValueError: where something else of the network's values is needed.
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
    """Whether a node asks for a size of a tensor."""
    return node.target is torch.ops.aten.sym_size.int
