"""What every plan of a run keeps to, whatever the method: least and largest widths, and their alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil, floor, gcd
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastprune.graph import ChannelGraph, Group
from fastprune.host.spelling import did_you_mean
from fastprune.planning.lineage import Lineage

ROUNDING = 1e-9  # 0.3 · 10 units are 3, not 4


class LimitError(ValueError):
    """Limits that contradict each other, or that a plan does not keep."""


@dataclass(frozen=True)
class Limits:
    """Widths that plans may have; they hold for every method, in local and in global ranking.

    Args:
        min_keep: units that stay at least in each group.
        round_to: the channels that the layers of a group keep are a multiple of this number, or all of them: 8 suits
            most devices. It holds for a group of 12 channels too, which may keep 8 or 12. (Where a layer has channels
            that always stay, they are not counted.)
        keep_ratios: {name or pattern of layers: (least, most)}, the parts of the output channels of these layers that
            must and may stay, in [0, 1]. A module's name stands for all layers in it. Where several fit, all hold.
        lineage: where the network came from; the parts are then those of the channels in that network.

    Raises:
        LimitError: for a number out of range.

    Example:
        >>> Limits(round_to=8, keep_ratios={"layer1": (0.5, 1.0), "layer4.*.conv2": (0.0, 0.25)}).round_to
        8
    """

    min_keep: int = 1
    round_to: int = 1
    keep_ratios: Mapping[str, tuple[float, float]] = field(default_factory=lambda: MappingProxyType({}))
    lineage: Lineage | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.min_keep < 1:
            raise LimitError(f"min_keep: at least 1 unit of each group must stay, got {self.min_keep}")
        if self.round_to < 1:
            raise LimitError(f"round_to {self.round_to}: channels can be rounded to multiples of 1 or more")
        for pattern, (least, most) in self.keep_ratios.items():
            if not (0 <= least <= most <= 1 and most > 0):
                raise LimitError(
                    f"keep_ratio {pattern}={least:g}:{most:g}: 0 <= least <= most <= 1 and most > 0 are needed"
                )

    @staticmethod
    def parse(keep_ratio: Sequence[str], *, min_keep: int = 1, round_to: int = 1) -> Limits:
        """Limits from texts ``PATTERN=LEAST:MOST``.

        Raises:
            LimitError: for a text of another form; shows the form.

        Example:
            >>> Limits.parse(["layer1=0.5:1", "*.conv2=0:0.25"]).keep_ratios["layer1"]
            (0.5, 1.0)
        """
        ratios = {}
        for text in keep_ratio:
            pattern, _, bounds = text.rpartition("=")
            least, colon, most = bounds.partition(":")
            try:
                ratios[pattern] = (float(least), float(most))
            except ValueError:
                pattern = ""
            if not (pattern and colon):
                raise LimitError(f"keep_ratio {text!r}: write PATTERN=LEAST:MOST, 'layer1=0.5:1' say")
        return Limits(min_keep, round_to, ratios)

    def as_settings(self) -> dict[str, Any]:
        """The arguments of ``parse``, as YAML has them."""
        ratios = [f"{pattern}={least!r}:{most!r}" for pattern, (least, most) in self.keep_ratios.items()]
        return {"min_keep": self.min_keep, "round_to": self.round_to, "keep_ratio": ratios}

    def __str__(self) -> str:
        parts = [f"min_keep {self.min_keep}"] if self.min_keep > 1 else []
        parts += [f"round_to {self.round_to}"] if self.round_to > 1 else []
        parts += [f"keep_ratio {name}={least:g}:{most:g}" for name, (least, most) in self.keep_ratios.items()]
        return ", ".join(parts) or "none"

    def widths(self, graph: ChannelGraph) -> list[Widths]:
        """The allowed widths of every group.

        Raises:
            LimitError: where a group has none, or a pattern is no layer's name.
        """
        ratios, per_unit = self._ratios(graph), channels_per_unit(graph)
        sizes = graph.offsets.diff() if self.lineage is None else self.lineage.in_first(graph).sizes
        return [
            self._widths(group, size, self.round_to // gcd(self.round_to, channels), *ratio)
            for group, size, channels, ratio in zip(graph.groups, sizes.tolist(), per_unit, ratios, strict=True)
        ]

    def _widths(self, group: Group, size: int, step: int, lowest: float, highest: float) -> Widths:
        least = min(group.size, max(self.min_keep, ceil(lowest * size - ROUNDING)))
        most = floor(highest * size + ROUNDING)
        allowed = Widths(group.size, step, 0, group.size)
        least, most = allowed.at_least(least), allowed.at_most(most)
        if most < least:
            raise LimitError(
                f"group {group.name!r} of {group.size} units cannot keep to its limits ({self}): "
                f"at least {least} and at most {most} would have to stay; loosen one of them"
            )
        return Widths(group.size, step, least, most)

    def _ratios(self, graph: ChannelGraph) -> list[tuple[float, float]]:
        """For each group the least and the largest part that may stay."""
        ratios = [(0.0, 1.0)] * len(graph.groups)
        for pattern, (least, most) in self.keep_ratios.items():
            for g in groups_of_layers(graph, pattern):
                ratios[g] = max(ratios[g][0], least), min(ratios[g][1], most)
        return ratios

    def broken_by(self, graph: ChannelGraph, mask: Tensor) -> str | None:
        """How a flat mask [U] does not keep to the limits, for people; None if it does."""
        for group, widths in zip(graph.groups, self.widths(graph), strict=True):
            kept = int(mask[group.units].sum())
            if kept not in widths:
                return f"{kept} of the {group.size} units of group {group.name!r} stay, but {widths} must ({self})"
        return None


@dataclass(frozen=True)
class Widths:
    """The numbers of units that a group may keep: multiples of a step, or all of them, within bounds.

    Args:
        size: units of the group.
        step: what widths are a multiple of.
        least: the smallest width, itself allowed.
        most: the largest one.
    """

    size: int
    step: int
    least: int
    most: int

    def at_least(self, width: int) -> int:
        """The smallest multiple of the step from ``width`` on; ``size`` where there is none below."""
        return min(self.size, ceil(width / self.step) * self.step)

    def at_most(self, width: int) -> int:
        """The largest multiple of the step up to ``width``; ``size`` where all units are meant."""
        return self.size if width >= self.size else width // self.step * self.step

    def __contains__(self, width: int) -> bool:
        return self.least <= width <= self.most and (width == self.size or width % self.step == 0)

    def __str__(self) -> str:
        multiple = f"a multiple of {self.step} (or all {self.size}) " if self.step > 1 else ""
        return f"{multiple}from {self.least} to {self.most}"


def channels_per_unit(graph: ChannelGraph) -> list[int]:
    """For each group how many output channels of its layers one unit stands for (several in a grouped convolution)."""
    found, group_of_unit = [0] * len(graph.groups), graph.group_of_unit
    for piece in graph.slices:
        if piece.role == "out":
            groups, counts = group_of_unit[piece.units[piece.units >= 0]].unique(return_counts=True)
            for g, count in zip(groups.tolist(), counts.tolist(), strict=True):
                found[g] = gcd(found[g], count // graph.groups[g].size)
    return [max(1, channels) for channels in found]


def groups_of_layers(graph: ChannelGraph, pattern: str) -> list[int]:
    """The groups of the output channels of layers that fit a name or pattern.

    Raises:
        LimitError: if there is no such layer, or none whose channels can go.
    """
    named = {layer.name for layer in graph.layers}
    chosen = {name for name in named if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
    if not chosen:
        hint = did_you_mean(pattern, sorted(named), "; {}")
        raise LimitError(f"keep_ratio {pattern!r}: no layer has such a name{hint}")
    units = [layer.out_units[layer.out_units >= 0] for layer in graph.layers if layer.name in chosen]
    groups: list[int] = graph.group_of_unit[torch.cat(units)].unique().tolist()
    if not groups:
        raise LimitError(f"keep_ratio {pattern!r}: none of its layers has channels that can go")
    return groups
