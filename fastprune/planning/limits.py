"""Limits of widths, which every plan keeps to, for any method: smallest and largest widths, and their rounding."""

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
    """Limits that contradict each other, or that a plan breaks."""


@dataclass(frozen=True)
class Limits:
    """The widths that plans may have, for every method, in local and in global ranking.

    Args:
        min_keep: the smallest number of units of each group that stay.
        round_to: layers keep a multiple of this number of channels, or all of them: 8 suits most devices. It holds for
            a group of 12 channels too, which may keep 8 or 12. (Channels that always stay are not counted.)
        keep_ratios: {name or pattern of layers: (least, most)}, the parts of the output channels of these layers that
            must and may stay, in [0, 1]. A module's name stands for all layers in it. If several fit a layer, all hold.
        lineage: the origin of the network; parts are then those of the channels in the first network.

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
            raise LimitError(f"min_keep {self.min_keep}: at least 1 unit of each group must stay")
        if self.round_to < 1:
            raise LimitError(f"round_to {self.round_to}: channels can be rounded to multiples of 1 or more")
        for pattern, (least, most) in self.keep_ratios.items():
            if not (0 <= least <= most <= 1 and most > 0):
                raise LimitError(
                    f"keep_ratio {pattern}={least:g}:{most:g}: 0 <= least <= most <= 1 and most > 0 are needed"
                )

    @staticmethod
    def parse(keep_ratio: Sequence[str], *, min_keep: int = 1, round_to: int = 1) -> Limits:
        """Read limits from texts ``PATTERN=LEAST:MOST``.

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
                raise LimitError(f"keep_ratio {text!r}: write PATTERN=LEAST:MOST, for example 'layer1=0.5:1'")
        return Limits(min_keep, round_to, ratios)

    @staticmethod
    def of(limits: object) -> Limits:
        """Return what a user gives as limits: ``Limits``, their fields by name, or None for no limits.

        Raises:
            LimitError: if it is none of them, for an unknown name, or a value of another type.

        Example:
            >>> Limits.of({"round_to": 8, "keep_ratios": {"layer1": (0.5, 1.0)}}).round_to
            8
        """
        if limits is None or isinstance(limits, Limits):
            return limits or Limits()
        if not isinstance(limits, Mapping):
            raise LimitError(
                f"limits: got {type(limits).__name__}; Limits(round_to=8) or a dict such as {{'round_to': 8}} is needed"
            )
        known = ("min_keep", "round_to", "keep_ratios")
        for name, value in limits.items():
            if name not in known:
                hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
                raise LimitError(f"limits: there is no {name!r}; {hint}")
            if name != "keep_ratios" and (not isinstance(value, int) or isinstance(value, bool)):
                raise LimitError(f"limits: {name} {value!r}: a whole number is needed")
        return Limits(**{**limits, "keep_ratios": read_ratios(limits.get("keep_ratios", {}))})

    def as_settings(self) -> dict[str, Any]:
        """Return the arguments of ``parse``, as YAML has them."""
        ratios = [f"{pattern}={least!r}:{most!r}" for pattern, (least, most) in self.keep_ratios.items()]
        return {"min_keep": self.min_keep, "round_to": self.round_to, "keep_ratio": ratios}

    def __str__(self) -> str:
        parts = [f"min_keep {self.min_keep}"] if self.min_keep > 1 else []
        parts += [f"round_to {self.round_to}"] if self.round_to > 1 else []
        parts += [f"keep_ratio {name}={least:g}:{most:g}" for name, (least, most) in self.keep_ratios.items()]
        return ", ".join(parts) or "none"

    def widths(self, graph: ChannelGraph) -> list[Widths]:
        """Return the allowed widths of every group.

        Raises:
            LimitError: if a group has none, or no layer fits a pattern.
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
                f"at least {least} and at most {most} units would have to stay; loosen one of them"
            )
        return Widths(group.size, step, least, most)

    def _ratios(self, graph: ChannelGraph) -> list[tuple[float, float]]:
        """Return for each group the smallest and the largest part that may stay."""
        ratios = [(0.0, 1.0)] * len(graph.groups)
        for pattern, (least, most) in self.keep_ratios.items():
            for g in groups_of_layers(graph, pattern):
                ratios[g] = max(ratios[g][0], least), min(ratios[g][1], most)
        return ratios

    def broken_by(self, graph: ChannelGraph, mask: Tensor) -> str | None:
        """Describe how a flat mask [U] breaks the limits; None if it keeps to them."""
        for group, widths in zip(graph.groups, self.widths(graph), strict=True):
            kept = int(mask[group.units].sum())
            if kept not in widths:
                return f"{kept} of the {group.size} units of group {group.name!r} stay, but {widths} must ({self})"
        return None


def read_ratios(ratios: object) -> dict[str, tuple[float, float]]:
    """Return ``keep_ratios`` as a user gives them, checked.

    Raises:
        LimitError: for anything but pairs of numbers by name.
    """
    if not isinstance(ratios, Mapping):
        raise LimitError(f"limits: keep_ratios {ratios!r}: pairs by name are needed, as in {{'layer1': (0.5, 1.0)}}")
    for pattern, pair in ratios.items():
        numbers = isinstance(pair, (tuple, list)) and all(isinstance(x, (int, float)) for x in pair)
        if not numbers or len(pair) != 2:
            raise LimitError(f"limits: keep_ratios {pattern!r} {pair!r}: a pair (least, most) of numbers is needed")
    return {str(pattern): (float(pair[0]), float(pair[1])) for pattern, pair in ratios.items()}


@dataclass(frozen=True)
class Widths:
    """The numbers of units that a group may keep: multiples of a step, or all of them, within bounds.

    Args:
        size: number of units of the group.
        step: widths are multiples of it.
        least: the smallest width, itself allowed.
        most: the largest width.
    """

    size: int
    step: int
    least: int
    most: int

    def at_least(self, width: int) -> int:
        """Return the smallest multiple of the step from ``width`` on; ``size`` if there is none below."""
        return min(self.size, ceil(width / self.step) * self.step)

    def at_most(self, width: int) -> int:
        """Return the largest multiple of the step up to ``width``; ``size`` if all units are meant."""
        return self.size if width >= self.size else width // self.step * self.step

    def __contains__(self, width: int) -> bool:
        return self.least <= width <= self.most and (width == self.size or width % self.step == 0)

    def __str__(self) -> str:
        multiple = f"a multiple of {self.step} (or all {self.size}) " if self.step > 1 else ""
        return f"{multiple}from {self.least} to {self.most}"


def channels_per_unit(graph: ChannelGraph) -> list[int]:
    """Return for each group the output channels of its layers per unit (several in a grouped convolution)."""
    found, group_of_unit = [0] * len(graph.groups), graph.group_of_unit
    for piece in graph.slices:
        if piece.role == "out":
            groups, counts = group_of_unit[piece.units[piece.units >= 0]].unique(return_counts=True)
            for g, count in zip(groups.tolist(), counts.tolist(), strict=True):
                found[g] = gcd(found[g], count // graph.groups[g].size)
    return [max(1, channels) for channels in found]


def groups_of_layers(graph: ChannelGraph, pattern: str) -> list[int]:
    """Return the groups of the output channels of layers that fit a name or pattern.

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
