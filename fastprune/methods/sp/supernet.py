"""The super-net of SP: a network cut into stages, each of which can run separately on slices of its weights.

A sub-network of one stage reads the full network's features at the start of the stage. A 1×1 convolution (the adaptor)
brings its own features to full width, where they are compared with the full network's at the end of the stage. So the
stages train and are searched independently.

Source: Zhang and Ou, SP, §3.2 and eq. 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph, trace
from fastprune.graph.export.regions import restore_modes
from fastprune.graph.stages import Stage
from fastprune.graph.structure import index_slices
from fastprune.methods.sp.stage_graphs import ADAPTOR, build_feature_graph, cut_out
from fastprune.networks.subnetworks import SubNetworks


class SuperNet:
    """A network, and the sub-networks of its stages on slices of its weights.

    Args:
        graph: the traced network.
        model: the model that was traced; its parameters are the super-net's.
        stages: the stages of the network.
        seed: the seed of the adaptors' initial weights; the global generator does not change.

    Raises:
        ValueError: if a stage reads values of the network other than its features, or a batch norm has cumulative
            statistics.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, stages: Sequence[Stage], seed: int = 0) -> None:
        self.graph, self.stages = graph, tuple(stages)
        self.norms = [norm for norm in model.modules() if isinstance(norm, _NormBase) and norm.track_running_stats]
        for name, norm in model.named_modules():
            if norm in self.norms and norm.momentum is None:
                raise ValueError(f"{name}: batch norms with cumulative statistics are not supported; set its momentum")
        self.training_graph = build_feature_graph(graph, model, stages, training=True)
        self.evaluation_graph = build_feature_graph(graph, model, stages, training=False)
        codegen: Any = graph.traced.evaluation.graph._codegen
        self.out_spec: pytree.TreeSpec = codegen.pytree_info.out_spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adaptors = nn.ModuleList(make_adaptor(stage, model) for stage in stages)
        self.parts = [
            StageNetwork(graph, model, stage, cast("nn.Conv2d", adaptor))
            for stage, adaptor in zip(stages, self.adaptors, strict=True)
        ]

    def run_full(self, images: Tensor) -> tuple[list[Tensor], Any]:
        """Run the full network in train mode; its batch norms update their running statistics.

        Returns:
            The input of the first stage and the output of each stage, detached; and the outputs of the model.
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
        """Compute the input of the first stage and the output of each, with the batch's statistics, without dropout."""
        with restore_modes():
            results = self.evaluation_graph(images)
        return [images, *results[: len(self.stages)]]

    def distance(self, number: int, features: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Compute eq. 7 for a sub-network of one stage: the mean over batch, channels, pixels of |A(stage(x)) − y|².

        Args:
            number: the number of the stage.
            features: x, the input of the stage in the full network, [N, C, H, W].
            target: y, the output of the stage in the full network.
            mask: the kept units, bool [U] on the CPU; the units of other stages do not matter.
        """
        return F.mse_loss(self.parts[number](features, mask).float(), target.float())


class StageNetwork:
    """The sub-networks of one stage, with its adaptor.

    Args:
        graph: the traced network.
        model: the model that was traced.
        stage: the stage.
        adaptor: the adaptor of the stage.

    Shapes:
        ``network(features [N, C, H, W], mask [U])`` returns features [N, C', H', W'] of the stage's full width.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, stage: Stage, adaptor: nn.Conv2d) -> None:
        network, shape = cut_out(graph, model, stage, adaptor)
        device = adaptor.weight.device
        example = torch.zeros(shape, device=device, dtype=adaptor.weight.dtype)
        own = trace(network, example, rewrite=graph.rewrites, exact=graph.exact)
        self.slices = SubNetworks(own, network)
        self.unit = map_units(graph, own, stage)

    def __call__(self, features: Tensor, mask: Tensor) -> Tensor:
        """Compute the stage's features under the mask [U] of the whole network."""
        return cast("Tensor", self.slices(features, mask=self.own_mask(mask)))

    def own_mask(self, mask: Tensor) -> Tensor:
        """Turn the mask of the whole network, [U], into a mask over the units of the stage's own graph."""
        return torch.cat([mask, torch.ones(1, dtype=torch.bool)])[self.unit]


def make_adaptor(stage: Stage, model: nn.Module) -> nn.Conv2d:
    """Create a random 1×1 convolution from a stage's features to themselves, sliced on its inputs with the features."""
    like = next(model.parameters())
    with torch.device("cpu"):
        adaptor = nn.Conv2d(stage.channels, stage.channels, 1)
    return adaptor.to(like)


def map_units(graph: ChannelGraph, own: ChannelGraph, stage: Stage) -> Tensor:
    """Map each unit of a stage's own graph to its unit in the network's, −1 for units that are always kept.

    Raises:
        ValueError: if channels of one of the stage's groups cannot be removed in the stage; names the group.
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
                f"stage {stage.name!r}: channels of {group.name!r} cannot be removed within it; give other stages"
            )
    return found
