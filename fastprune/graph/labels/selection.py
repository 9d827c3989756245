"""Where moved values come from: which channels of which value, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastprune.graph.labels.labels import along, canonical, spread, varying


@dataclass(frozen=True)
class Origin:
    """Where the elements of a value lie in ``base``, a value that it was made from by moves alone.

    Args:
        base: the node.
        shape: its shape.
        positions: for each dimension of ``base`` the index of every element of the value, canonical, int64.
    """

    base: Node
    shape: tuple[int, ...]
    positions: tuple[Tensor, ...]

    @staticmethod
    def of(node: Node, shape: tuple[int, ...]) -> Origin:
        """A value as its own origin."""
        return Origin(node, shape, tuple(spread(torch.arange(n), shape, dim) for dim, n in enumerate(shape)))

    def moved(self, operator: Callable[[Tensor], Any]) -> list[Origin]:
        """The origin of each result of a move."""
        results = [operator(positions) for positions in self.positions]
        if isinstance(results[0], Tensor):
            results = [[result] for result in results]
        return [Origin(self.base, self.shape, tuple(map(canonical, places))) for places in zip(*results, strict=True)]


@dataclass(frozen=True)
class Selection:
    """A value that equals ``base.index_select(dim, indices)``.

    Args:
        base: the node.
        dim: a dimension.
        indices: which of its indices, in which order, int64.
    """

    base: Node
    dim: int
    indices: Tensor


def selection(origin: Origin, shape: tuple[int, ...]) -> Selection | None:
    """The selection along one dimension that a value of ``shape`` is, None if it is no such thing."""
    if len(shape) != len(origin.shape):
        return None
    moved = []
    for dim, positions in enumerate(origin.positions):
        indices = along(positions, dim)
        if indices is None or any(d != dim for d in varying(positions)):
            return None
        if len(indices) != origin.shape[dim] or not torch.equal(indices, torch.arange(len(indices))):
            moved.append((dim, indices))
    if len(moved) > 1:
        return None
    return Selection(origin.base, *(moved or [(0, torch.arange(shape[0]))])[0])
