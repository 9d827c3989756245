"""The super-net of SP: a network cut into stages, each of which can run separately on slices of its weights.

A sub-network of one stage reads the full network's features at the start of the stage. A 1×1 convolution (the adaptor)
brings its own features to full width, where they are compared with the full network's at the end of the stage. So the
stages train and are searched independently.

Adaptors start as the identity, of which a narrower stage has the first columns: a stage at full width then begins
without a loss. Random ones, the paper's, leave the full stages themselves at more than half of their loss.

Source: Zhang and Ou, SP, §3.2 and eq. 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from fastprune.graph import ChannelGraph, trace
from fastprune.graph.export.regions import restore_modes
from fastprune.graph.stages import Stage
from fastprune.graph.structure import index_slices
from fastprune.methods.sp.stage_graphs import ADAPTOR, build_feature_graph, copy_whole, cut_out
from fastprune.networks.subnetworks import SubNetworks
from fastprune.training.objective import Objective

CHUNK = 128  # images of one backward pass for the gradients of a search

Start = Literal["identity", "random"]


class SuperNet:
    """A network, and the sub-networks of its stages on slices of its weights.

    Args:
        graph: the traced network.
        model: the model that was traced; its parameters are the super-net's.
        stages: the stages of the network.
        seed: the seed of random adaptors; the global generator does not change.
        start: what adaptors start as.

    Raises:
        ValueError: if a stage reads values of the network other than its features, or a batch norm has cumulative
            statistics.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        model: nn.Module,
        stages: Sequence[Stage],
        seed: int = 0,
        start: Start = "identity",
    ) -> None:
        self.graph, self.model, self.stages = graph, model, tuple(stages)
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
            self.adaptors = nn.ModuleList(make_adaptor(stage, model, start) for stage in stages)
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

    def gradients(self, images: Tensor, targets: Tensor, objective: Objective) -> list[Tensor]:
        """Compute the gradient of each image's loss with respect to the output of each stage in the full network.

        Batch norms take the running statistics: those of the batch would mix the losses of its images, and all images
        would have to go through at once. Parameters receive no gradients.

        Args:
            images: [N, C, H, W].
            targets: the targets of the loss, [N, ...].
            objective: the loss.

        Returns:
            Tensors of the shapes of the stages' features, float32.
        """
        graph = build_feature_graph(self.graph, self.model, self.stages, training=False, batch_statistics=False)
        found: list[list[Tensor]] = [[] for _ in self.stages]
        for some, wanted in zip(images.split(CHUNK), targets.split(CHUNK), strict=True):
            with torch.enable_grad(), torch.autocast(images.device.type, enabled=False), restore_modes():
                results = graph(some.detach().requires_grad_())  # for stages without a parameter that is trained
                features = results[: len(self.stages)]
                outputs = pytree.tree_unflatten(results[len(self.stages) :], self.out_spec)
                loss = objective.compute(outputs, wanted) * len(some)  # it is a mean
                for kept, gradient in zip(found, torch.autograd.grad(loss, features), strict=True):
                    kept.append(gradient.float())
        return [torch.cat(kept) for kept in found]

    @cached_property
    def own_features(self) -> list[StageNetwork]:
        """The stages with fixed identities for adaptors, so that they return their own features, 0 where cut off."""
        with torch.random.fork_rng(devices=[]):
            adaptors = [make_adaptor(stage, self.model).requires_grad_(False) for stage in self.stages]
        return [
            StageNetwork(self.graph, self.model, stage, adaptor)
            for stage, adaptor in zip(self.stages, adaptors, strict=True)
        ]

    def distance(self, number: int, features: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Compute eq. 7 for a sub-network of one stage: the mean over batch, channels, pixels of |A(stage(x)) − y|².

        Args:
            number: the number of the stage.
            features: x, the input of the stage in the full network, [N, C, H, W].
            target: y, the output of the stage in the full network.
            mask: the kept units, bool [U] on the CPU; the units of other stages do not matter.
        """
        return F.mse_loss(self.parts[number](features, mask).float(), target.float())


class Part:
    """The sub-networks of a part of a network, traced again as a network of its own.

    Args:
        graph: the traced network.
        network: the part.
        example: an input of the part.
        groups: the groups whose channels may go.
        name: the name of the part, for messages.
    """

    def __init__(
        self, graph: ChannelGraph, network: GraphModule, example: Tensor, groups: Sequence[int], name: str
    ) -> None:
        own = trace(network, example, exact=graph.exact)
        self.slices = SubNetworks(own, network)
        self.unit = map_units(graph, own, groups, name)

    def __call__(self, features: Tensor, mask: Tensor) -> Tensor:
        """Compute the part's outputs under the mask [U] of the whole network."""
        return cast("Tensor", self.slices(features, mask=self.own_mask(mask)))

    def own_mask(self, mask: Tensor) -> Tensor:
        """Turn the mask of the whole network, [U], into a mask over the units of the part's own graph."""
        return torch.cat([mask, torch.ones(1, dtype=torch.bool)])[self.unit]


class StageNetwork(Part):
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
        example = torch.zeros(shape, device=adaptor.weight.device, dtype=adaptor.weight.dtype)
        super().__init__(graph, network, example, stage.groups, stage.name)


class WholeNetwork(Part):
    """The sub-networks of the whole network, without adaptors: each layer reads the narrow features before it.

    Args:
        graph: the traced network.
        model: the model that was traced.
        groups: the groups whose channels may go.
        images: some images.

    Shapes:
        ``network(images [N, C, H, W], mask [U])`` returns the scores of the main head.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, groups: Sequence[int], images: Tensor) -> None:
        example = images[:2].to(next(model.parameters()).dtype)
        super().__init__(graph, copy_whole(graph, model), example, groups, "the network")


def make_adaptor(stage: Stage, model: nn.Module, start: Start = "identity") -> nn.Conv2d:
    """Create a 1×1 convolution from a stage's features to themselves, sliced on its inputs with the features."""
    like = next(model.parameters())
    with torch.device("cpu"):
        adaptor = nn.Conv2d(stage.channels, stage.channels, 1)
    if start == "identity":
        with torch.no_grad():
            adaptor.weight.copy_(torch.eye(stage.channels)[:, :, None, None])
            cast("Tensor", adaptor.bias).zero_()
    return adaptor.to(like)


def map_units(graph: ChannelGraph, own: ChannelGraph, groups: Sequence[int], name: str) -> Tensor:
    """Map each unit of a part's own graph to its unit in the network's, −1 for units that are always kept.

    Raises:
        ValueError: if channels of one of the groups cannot be removed in the part; names the group.
    """
    whole = index_slices(graph.slices)
    decided = torch.zeros(graph.num_units + 1, dtype=torch.bool)
    for number in groups:
        decided[graph.groups[number].units] = True
    unit = torch.full((own.num_units,), graph.num_units)
    for piece in own.slices:
        inside = piece.units >= 0
        if piece.tensor.startswith(f"{ADAPTOR}."):
            continue
        known = whole.get(piece.place)
        unit[piece.units[inside]] = known.units[inside] if known is not None else -1
    found = torch.where((unit < graph.num_units) & decided[unit], unit, -1)
    for number in groups:
        group = graph.groups[number]
        if not bool(torch.isin(torch.arange(group.start, group.start + group.size), found).all()):
            raise ValueError(
                f"stage {name!r}: channels of {group.name!r} cannot be removed within it; give other stages"
            )
    return found
