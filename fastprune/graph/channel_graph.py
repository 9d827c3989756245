"""The channel graph: which channels of a network can only leave together, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastprune.graph.conventions import Flops, cost_model_in
from fastprune.graph.cost import Cost, CostModel
from fastprune.graph.latency.model import LatencyModel
from fastprune.graph.latency.timing import measure
from fastprune.graph.plan import PruningPlan
from fastprune.graph.structure import GraphStructure
from fastprune.host.distributed import Distributed
from fastprune.host.wording import Facts, card, count, html_card, percent


@dataclass(frozen=True)
class ChannelGraph(GraphStructure):
    """The result of ``trace``: the groups of a network, their cost, and plans for them.

    Its fields are those of ``GraphStructure``.
    """

    _latencies: dict[tuple[Any, ...], LatencyModel] = field(default_factory=dict, repr=False, compare=False)
    _counted: dict[str, CostModel] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but latency models, which hold operators of torch and are cached on disk."""
        return {**vars(self), "_latencies": {}}

    def cost(self, mask: Tensor | None = None, *, flops: Flops = "mac") -> Cost:
        """Return MACs and parameters per sample, exact for 0/1 masks and differentiable for soft ones.

        Args:
            mask: flat mask [U] of any real or boolean dtype; None = the full network.
            flops: how operations count: "mac", or one of the papers' conventions, see ``graph.conventions``.

        Returns:
            ``Cost`` of two float64 scalars.

        Raises:
            ValueError: if the mask has another shape.
        """
        return self.counted(flops)(torch.ones(self.num_units) if mask is None else mask)

    def counted(self, flops: Flops) -> CostModel:
        """Return the cost model in a convention, see ``graph.conventions``."""
        if flops not in self._counted:
            self._counted[flops] = cost_model_in(self, flops)
        return self._counted[flops]

    def latency(
        self,
        device: torch.device | str = "cpu",
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        *,
        channels_last: bool = False,
        cache: bool = True,
        peers: Distributed | None = None,
    ) -> LatencyModel:
        """Return a model of a forward pass's milliseconds, from operators measured here on a grid of widths.

        The first call for a network takes a minute or so. Times are kept in the user's cache folder
        (``FASTPRUNE_CACHE`` names another one), by device, versions, threads, shapes and arguments.

        Args:
            device: the device that runs the network.
            batch: samples in a pass; height and width are those of the example.
            dtype: dtype of parameters and inputs.
            channels_last: whether parameters and inputs have this memory layout.
            cache: False measures anew, and keeps nothing on disk.
            peers: processes that have to agree and all call this: the first one measures, and all take its times.

        Returns:
            ``LatencyModel``: call it with a flat mask [U].

        Raises:
            ValueError: if the batch is below 1, or the network's code does not allow it.
        """
        device = torch.device(device)
        if batch < 1:
            raise ValueError(f"batch {batch}: at least 1 sample is needed")
        key = (device, batch, dtype, channels_last, torch.get_num_threads())
        if key not in self._latencies or not cache:
            self._latencies[key] = measure(
                self, device, batch, dtype, channels_last=channels_last, cache=cache, peers=peers or Distributed()
            )
        return self._latencies[key]

    def plan(self, mask: Tensor) -> PruningPlan:
        """Return the plan that keeps the units where the flat ``mask`` [U] is 1.

        Raises:
            ValueError: if the mask has another shape, holds anything but 0 and 1, or empties a group.
        """
        return PruningPlan.from_mask(self, mask)

    def __repr__(self) -> str:
        """Show groups and cost; ``graph.groups`` and ``graph.table()`` have the rest."""
        return card(*self._card())

    def _repr_html_(self) -> str:
        """Show the same in a notebook."""
        return html_card(*self._card())

    def _card(self) -> tuple[str, Facts]:
        cost, groups = self.cost(), self.groups
        streams = sum(group.kind == "stream" for group in groups)
        largest = sorted(groups, key=lambda group: -group.share)[:3]
        stay = len({layer for layer, _ in self.unprunable})
        shapes = ", ".join(f"{'×'.join(map(str, spec.shape))} {spec.dtype}" for spec in self.traced.inputs.specs)
        return f"ChannelGraph: {len(groups)} groups of {self.num_units:,} units", [
            ("MACs", f"{count(float(cost.macs))} per sample"),
            ("parameters", count(float(cost.params))),
            (
                "groups",
                f"{streams} of them pass residual additions" if streams else "none of them passes residual additions",
            ),
            ("largest", ", ".join(f"{g.name} ({g.size} units, {percent(g.share)} of the MACs)" for g in largest)),
            ("layers", f"{len({layer.name for layer in self.layers})} convolutions and linear layers"),
            (
                "kept",
                f"{stay} {'layer keeps' if stay == 1 else 'layers keep'} some or all channels; see graph.unprunable"
                if stay
                else "no layer",
            ),
            ("inputs", shapes),
            ("exact", "yes" if self.exact else f"not for {int(self.inexact_units.sum()):,} units; see graph.inexact"),
        ]
