"""Labels: one integer per channel, united where channels can only leave together."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

KEPT = 0  # the label of everything but prunable channels: pixels, constants, pinned results

IntArray = npt.NDArray[np.int64]


def canonicalise(labels: Tensor) -> Tensor:
    """Give labels stride 0 along every dimension in which they do not vary.

    Strides then tell along which dimensions labels vary, and a label tensor costs the memory of its varying part only.
    """
    for dim in range(labels.dim()):
        if labels.size(dim) > 1 and labels.stride(dim) != 0:
            first, varied = labels.narrow(dim, 0, 1), core(labels)
            if torch.equal(varied, core(first).expand_as(varied)):
                labels = first.expand_as(labels)
    return labels


def varying_dims(labels: Tensor) -> list[int]:
    """Return the dimensions along which canonical ``labels`` vary."""
    return [dim for dim in range(labels.dim()) if labels.size(dim) > 1 and labels.stride(dim) != 0]


def core(labels: Tensor) -> Tensor:
    """Reduce to size 1 every dimension along which canonical ``labels`` do not vary."""
    for dim in range(labels.dim()):
        if labels.size(dim) > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def vector_along(labels: Tensor, dim: int) -> Tensor | None:
    """Return the labels along ``dim`` as a vector, or None if they vary along another dimension, too."""
    if any(d != dim for d in varying_dims(labels)):
        return None
    return core(labels).flatten().expand(labels.size(dim))


def spread(vector: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """Return a label tensor of ``shape`` that varies along ``dim`` only."""
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return canonicalise(vector.reshape(view).expand(shape))


def kept_labels(shape: tuple[int, ...]) -> Tensor:
    """Return labels of ``shape`` in which nothing is prunable."""
    return torch.zeros((), dtype=torch.int64).expand(shape)


@dataclass
class LabelSpace:
    """All labels of one network: which are united, which are pinned and why.

    While labels flow, edges are only collected; the components are found once, at the end.
    """

    count: int = 1  # label 0 is KEPT
    _edges: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _pins: list[tuple[IntArray, str]] = field(default_factory=list)

    def fresh(self, size: int) -> Tensor:
        """Return ``size`` new labels."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Unite the labels that meet in ``a`` and ``b`` (same shape); pin those that meet KEPT, for ``reason``."""
        left, right = core(a), core(b)
        shape = torch.broadcast_shapes(left.shape, right.shape)
        x, y = left.expand(shape).flatten().numpy(), right.expand(shape).flatten().numpy()
        differ = x != y
        x, y = x[differ], y[differ]
        labelled = (x != KEPT) & (y != KEPT)
        self._edges.append((x[labelled], y[labelled]))
        self._pins.append((np.maximum(x, y)[~labelled], reason))

    def pin(self, labels: Tensor, reason: str) -> None:
        """Keep these channels in every plan, for ``reason``."""
        flat = core(labels).flatten().numpy()
        self._pins.append((flat[flat != KEPT], reason))

    def components(self) -> IntArray:
        """Return the smallest label of each label's class, [count], by min-label propagation with pointer jumping."""
        parent = np.arange(self.count)
        if not self._edges:
            return parent
        a = np.concatenate([edge[0] for edge in self._edges])
        b = np.concatenate([edge[1] for edge in self._edges])
        while True:
            low = np.minimum(parent[a], parent[b])
            high = np.maximum(parent[a], parent[b])
            open_edges = low != high
            if not open_edges.any():
                return parent
            a, b = a[open_edges], b[open_edges]
            np.minimum.at(parent, high[open_edges], low[open_edges])
            while True:
                jumped = parent[parent]
                if np.array_equal(jumped, parent):
                    break
                parent = jumped

    def reasons(self, components: IntArray) -> dict[int, str]:
        """Return why each pinned class is pinned: {smallest label of the class: first reason}."""
        found: dict[int, str] = {}
        for labels, reason in self._pins:
            for representative in np.unique(components[labels]).tolist():
                found.setdefault(representative, reason)
        return found
