"""From united labels to numbered units and their groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastprune.graph.labels.labels import IntArray
from fastprune.graph.labels.propagate import LabelledDim, Propagation


@dataclass(frozen=True)
class Units:
    """The numbers of units.

    Args:
        of_label: the unit of each label, -1 for none.
        offsets: the first unit of each group, and the number of all units, [G+1].
    """

    of_label: IntArray
    offsets: IntArray

    def find(self, labels: Tensor) -> IntArray:
        """Return the unit of each label, -1 for none."""
        found: IntArray = self.of_label[labels.numpy()]
        return found

    def groups_of(self, units: IntArray) -> list[int]:
        """Return the groups that units belong to, ascending."""
        groups: list[int] = np.unique(np.searchsorted(self.offsets, units[units >= 0], side="right") - 1).tolist()
        return groups


def number_units(components: IntArray, reasons: dict[int, str], dims: list[LabelledDim]) -> Units:
    """Number the prunable classes of labels as units.

    Classes that touch the same (tensor, dim) pairs equally often form a group; groups and units keep the trace's order.

    Args:
        components: the smallest label of each label's class.
        reasons: the pinned classes.
        dims: the labelled dimensions.
    """
    prunable = np.zeros(len(components), dtype=bool)
    for d in dims:
        prunable[components[d.labels.numpy()]] = True
    prunable[0] = False
    prunable[list(reasons)] = False
    classes = np.flatnonzero(prunable)
    group = group_classes(components, classes, dims)
    first_seen = np.full(group.max(initial=-1) + 1, len(components))
    np.minimum.at(first_seen, group, classes)
    order = np.lexsort((classes, first_seen[group]))
    unit_of_class = np.full(len(components), -1)
    unit_of_class[classes[order]] = np.arange(len(classes))
    sizes = np.bincount(group, minlength=len(first_seen))[np.argsort(first_seen)]
    return Units(unit_of_class[components], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def group_classes(components: IntArray, classes: IntArray, dims: list[LabelledDim]) -> IntArray:
    """Return a group number for each of ``classes``: equal if they touch the same dimensions equally often."""
    place = np.full(len(components), -1)
    place[classes] = np.arange(len(classes))
    group = np.zeros(len(classes), dtype=np.int64)
    count = 1
    for d in dims:  # splits only the classes that a dimension touches, as most dimensions touch few
        touched, times = np.unique(place[components[d.labels.numpy()]], return_counts=True)
        touched, times = touched[touched >= 0], times[touched >= 0]
        _, split = np.unique(group[touched] * (times.max(initial=0) + 1) + times, return_inverse=True)
        group[touched] = count + split
        count += split.max(initial=-1) + 1
    _, numbers = np.unique(group, return_inverse=True)
    return numbers


def unmade_dims(state: Propagation, dims: list[LabelledDim]) -> list[LabelledDim]:
    """Return the labelled dimensions whose channels no layer makes: parameters that are used elementwise."""
    components = state.space.components()
    made = {int(c) for d in dims if d.role == "out" for c in np.unique(components[d.labels.numpy()])}
    return [d for d in dims if not made.issuperset(np.unique(components[d.labels.numpy()]).tolist())]


def find_inexact(units: Units, state: Propagation) -> tuple[Tensor, tuple[str, ...]]:
    """Return the units that cannot be removed exactly, and the operators that mix them."""
    inexact = torch.zeros(int(units.offsets[-1]), dtype=torch.bool)
    operators: dict[str, None] = {}
    for labels, reason in state.mixed:
        found = units.find(labels)
        if (found >= 0).any():
            inexact[torch.from_numpy(found[found >= 0])] = True
            operators[reason] = None
    return inexact, tuple(operators)
