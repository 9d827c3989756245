"""The units of a compact network in the network that it came from, to which budgets and limits stay relative."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph
from fastprune.graph.plan import PlanError, PruningPlan
from fastprune.graph.structure import index_slices


@dataclass(frozen=True)
class Lineage:
    """The descent of a compact network from a first one.

    Args:
        first: the channel graph of the first network.
        plan: the plan that made the compact network out of it.
    """

    first: ChannelGraph
    plan: PruningPlan

    def places(self, graph: ChannelGraph) -> Tensor:
        """Return for each unit of the compact network's ``graph`` its unit in the first network, int64 [U].

        Raises:
            PlanError: if the graph has units that the first one lacks.
        """
        own = index_slices(self.plan.slices)
        places = torch.full((graph.num_units,), -1)
        for piece in graph.slices:
            first = own.get(piece.place)
            if first is not None and len(self.plan.kept_indices(first)) == len(piece.units):
                units = first.units[self.plan.kept_indices(first)]
                both = (piece.units >= 0) & (units >= 0)
                places[piece.units[both]] = units[both]
        if bool((places < 0).any()):
            name = graph.groups[int(graph.group_of_unit[places < 0][0])].name
            raise PlanError(f"the channels of group {name!r} always stay in the first network; trace both alike")
        return places

    def in_first(self, graph: ChannelGraph) -> InFirst:
        """Return the map from widths of the compact network to widths of the first one."""
        groups = self.first.group_of_unit
        places = self.places(graph)
        number = len(self.first.groups)
        mapped = torch.zeros(number, len(graph.groups), dtype=torch.float64)
        pairs = torch.stack([groups[places], graph.group_of_unit])
        mapped.index_put_(tuple(pairs), 1 / graph.offsets.diff().double()[pairs[1]], accumulate=True)
        stays = self.plan.mask.clone()
        stays[places] = False
        fixed = torch.zeros(number, dtype=torch.float64).index_add(0, groups, stays.double())
        return InFirst(mapped, fixed, self.first.offsets.diff()[groups[places[graph.offsets[:-1]]]])


@dataclass(frozen=True)
class InFirst:
    """Widths of the first network, ``mapped @ kept + fixed``, for kept units of the compact network's groups.

    Args:
        mapped: float64 [G of the first, G].
        fixed: units that stay in any case, float64 [G of the first].
        sizes: size in the first network of each group of the compact one, int64 [G].
    """

    mapped: Tensor
    fixed: Tensor
    sizes: Tensor

    def widths(self, kept: Tensor) -> Tensor:
        """Return float64 [..., G of the first] for kept units [..., G]; differentiable."""
        return kept @ self.mapped.to(kept.device).T + self.fixed.to(kept.device)
