"""The origin of moved values: which channels of which value, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastprune.graph.labels.labels import canonicalise, spread, varying_dims, vector_along


@dataclass(frozen=True)
class Origin:
    """The places in ``base`` of a value's elements; moves alone made the value from ``base``.

    Args:
        base: the node of the original value.
        shape: the shape of the original value.
        positions: for each dimension of ``base`` the index of every element of the value, canonical, int64.
    """

    base: Node
    shape: tuple[int, ...]
    positions: tuple[Tensor, ...]

    @staticmethod
    def identity(node: Node, shape: tuple[int, ...]) -> Origin:
        """Return a value as its own origin."""
        return Origin(node, shape, tuple(spread(torch.arange(n), shape, dim) for dim, n in enumerate(shape)))

    def move(self, operator: Callable[[Tensor], Any]) -> list[Origin]:
        """Return the origin of each result of a move."""
        results = [operator(positions) for positions in self.positions]
        if isinstance(results[0], Tensor):
            results = [[result] for result in results]
        moved = [tuple(map(canonicalise, positions)) for positions in zip(*results, strict=True)]
        return [Origin(self.base, self.shape, positions) for positions in moved]


@dataclass(frozen=True)
class Selection:
    """A value that equals ``base.index_select(dim, indices)``.

    Args:
        base: the node of the original value.
        dim: the dimension that is selected from.
        indices: the selected indices in order, int64.
    """

    base: Node
    dim: int
    indices: Tensor


def find_selection(origin: Origin, shape: tuple[int, ...]) -> Selection | None:
    """Return the selection along one dimension that makes a value of ``shape``, None if there is none."""
    if len(shape) != len(origin.shape):
        return None
    moved = []
    for dim, positions in enumerate(origin.positions):
        indices = vector_along(positions, dim)
        if indices is None or any(d != dim for d in varying_dims(positions)):
            return None
        if len(indices) != origin.shape[dim] or not torch.equal(indices, torch.arange(len(indices))):
            moved.append((dim, indices))
    if len(moved) > 1:
        return None
    return Selection(origin.base, *(moved or [(0, torch.arange(shape[0]))])[0])
