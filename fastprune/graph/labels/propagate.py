"""The findings while labels flow: labelled weights, uses of layers, and checks that must hold in the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from fastprune.graph.labels.labels import (
    KEPT,
    IntArray,
    LabelSpace,
    canonicalise,
    core,
    kept_labels,
    spread,
    varying_dims,
    vector_along,
)
from fastprune.graph.labels.selection import Origin, Selection
from fastprune.graph.structure import Role

# Takes the class of each label. Returns the labels to pin if a compact tensor would not keep its shape here, else None.
Check = Callable[[IntArray], Tensor | None]


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of the model; it stands for its value while labels flow."""

    name: str
    shape: tuple[int, ...]

    @property
    def layer(self) -> str:
        """The module that owns it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Computed:
    """A value between one parameter and a layer's weight that the network computes from it; see ``computed``.

    Args:
        source: the parameter.
        parts: the value's labels along dimension 0 of the parameter, and those along its dimension 1. They are apart
            because an element of a weight belongs to two channels.
    """

    source: Weight
    parts: tuple[Tensor, Tensor]

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.source.name

    @property
    def layer(self) -> str:
        """The module that owns the parameter."""
        return self.source.layer.partition(".parametrizations")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return tuple(self.parts[0].shape)

    @property
    def is_weight(self) -> bool:
        """Whether its channels lie along the same dimensions as the parameter's."""
        at_home = all(set(varying_dims(part)) <= {dim} for dim, part in enumerate(self.parts))
        return at_home and self.shape == self.source.shape


@dataclass(frozen=True)
class LabelledDim:
    """The labels of one dimension of one parameter or buffer.

    Args:
        tensor: name in the model's state.
        dim: the dimension.
        labels: one label per index, int64 [size(dim)].
        role: the role in its layer; see ``structure.Slice``.
        computed: whether a layer's weight is computed from the tensor (weight standardisation, say).
    """

    tensor: str
    dim: int
    labels: Tensor
    role: Role
    computed: bool = False


@dataclass(frozen=True)
class Call:
    """One use of a convolution or linear layer.

    Args:
        layer: name of the module that owns the weight.
        kind: the operator, "conv2d" say.
        weight: name of the weight.
        positions: number of uses of each weight per sample: output pixels of a convolution.
        node: the graph's node.
        in_labels: labels of its input channels, [channels].
        out_labels: labels of its output channels.
        channel_dim: the dimension of its input that holds the channels.
        depthwise: whether each output channel reads its own input channel only.
    """

    layer: str
    kind: str
    weight: str
    positions: int
    node: str
    in_labels: Tensor
    out_labels: Tensor
    channel_dim: int
    depthwise: bool


@dataclass(frozen=True)
class Repeats:
    """A kernel that runs along channels: its multiply-accumulates shrink with them, its weight does not.

    Args:
        node: the graph's node.
        labels: labels of the channels.
        macs: multiply-accumulates per channel and sample.
    """

    node: str
    labels: Tensor
    macs: int


@dataclass
class Propagation:
    """All findings from running a model's graphs on labels; shared by the eval-mode and the train-mode graph."""

    exact: bool = True  # whether operators that mix channels pin them; False = they are noted in ``mixed``
    rewrites: bool = True  # whether the compact network may be a rewritten graph; False = the model's own code runs it
    # {module: the values of its attributes that may be numbers of channels}; see ``graph.held_sizes``
    held: Mapping[str, frozenset[Any]] = field(default_factory=dict)
    norms: Collection[str] = ()  # modules whose statistics count removed channels as zeros; see ``graph.norms``
    heads: bool = False  # whether whole heads of attention may leave
    counted: set[str] = field(default_factory=set)  # those of them that channels pass
    space: LabelSpace = field(default_factory=LabelSpace)
    dims: dict[tuple[str, int], LabelledDim] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    fixed_macs: int = 0  # of layers that are not understood, so that all their channels stay
    repeats: list[Repeats] = field(default_factory=list)
    mixed: list[tuple[Tensor, str]] = field(default_factory=list)  # channels whose removal changes statistics
    added: list[Tensor] = field(default_factory=list)  # channels that pass a residual addition
    locked: dict[str, str] = field(default_factory=dict)  # {tensor that keeps its shape: why}
    checks: list[tuple[Check, str]] = field(default_factory=list)  # (check, reason to pin the labels that fail it)
    origins: dict[Node, Origin] = field(default_factory=dict)  # of values whose channels lie along several dimensions
    # For each move that takes channels, the selection that makes each of its results.
    selections: dict[Node, list[Selection]] = field(default_factory=dict)

    def let_mix(self, labels: Tensor, reason: str) -> bool:
        """Note that an operator mixes channels; return whether they may leave all the same. If not, pin them."""
        if not self.exact:
            self.mixed.append((core(labels).flatten(), reason))
        return not self.exact

    def label_source(self, weight: Weight, reason: str) -> Computed:
        """Label a parameter from which a layer's weight is computed; the layer gives the roles of its dimensions."""
        parts = []
        for dim in (0, 1):
            known = self.dims.get((weight.name, dim))
            if known is not None and not known.computed:
                self.space.pin(known.labels, f"{reason} (uses {weight.name} in another way elsewhere)")
            if known is None and weight.shape[dim] > 1:
                labels = self.space.fresh(weight.shape[dim])
                known = self.dims[weight.name, dim] = LabelledDim(weight.name, dim, labels, "channel", computed=True)
            parts.append(kept_labels(weight.shape) if known is None else spread(known.labels, weight.shape, dim))
        return Computed(weight, (parts[0], parts[1]))

    def assign_role(self, weight: Computed, dim: int, role: Role, reason: str) -> Tensor:
        """Give ``role`` to a computed weight's dimension; return the labels along it."""
        known = self.dims.get((weight.name, dim))
        if known is not None and known.role == "channel":
            self.dims[weight.name, dim] = replace(known, role=role)
        elif known is not None and known.role != role:
            self.space.pin(known.labels, f"{reason} (uses {weight.name} in another way elsewhere)")
        labels = vector_along(weight.parts[dim], dim)
        assert labels is not None  # because of ``is_weight``
        return labels

    def label_dim(self, weight: Weight | Computed, dim: int, labels: Tensor, role: Role, reason: str) -> None:
        """Assign index j of ``weight`` along ``dim`` to channel ``labels[j]``."""
        if isinstance(weight, Computed):
            self.space.unite(self.assign_role(weight, dim, role, reason), labels, reason)
            return
        known = self.dims.get((weight.name, dim))
        if known is None:
            self.dims[weight.name, dim] = LabelledDim(weight.name, dim, labels, role)
        else:
            self.space.unite(known.labels, labels, reason)
            self.require_role(known, role, reason)

    def require_role(self, known: LabelledDim, role: Role, reason: str) -> None:
        """Pin a dimension that has two roles: a weight tied to its transpose makes channels where it reads some."""
        if role != known.role or known.computed:
            self.space.pin(known.labels, f"{reason} (uses {known.tensor} in another way elsewhere)")

    def fresh_dim(self, weight: Weight | Computed, dim: int, role: Role, reason: str, *, repeat: int = 1) -> Tensor:
        """Return new labels for ``weight`` along ``dim``, or its known ones.

        With ``repeat`` > 1 the others repeat the labels of the first ``size / repeat`` indices.
        """
        known = self.dims.get((weight.name, dim))
        if isinstance(weight, Computed):
            labels = self.assign_role(weight, dim, role, reason)
        elif known is not None:
            labels = known.labels
            self.require_role(known, role, reason)
        else:
            labels = self.space.fresh(weight.shape[dim] // repeat).repeat(repeat)
            self.dims[weight.name, dim] = LabelledDim(weight.name, dim, labels, role)
            return labels
        rows = labels.reshape(repeat, -1)
        self.space.unite(rows[:1].expand_as(rows), rows, f"{reason} (grouped)")
        return labels

    def labels_of(self, weight: Weight, reason: str) -> Tensor:
        """Return the labels of a weight that is used as a value; one that is wide in several dimensions is locked."""
        wide = [dim for dim, size in enumerate(weight.shape) if size > 1]
        if len(wide) == 1:
            labels = self.fresh_dim(weight, wide[0], "channel", reason)
            shape = [1] * len(weight.shape)
            shape[wide[0]] = -1
            return canonicalise(labels.reshape(shape))
        if wide:
            self.locked.setdefault(weight.name, reason)
        return kept_labels(weight.shape)

    def mixed_classes(self, components: IntArray) -> dict[int, str]:
        """Return the classes that cannot leave exactly, and the first operator that mixes each."""
        found: dict[int, str] = {}
        for labels, reason in self.mixed:
            for representative in np.unique(components[labels.numpy()]).tolist():
                found.setdefault(representative, reason)
        found.pop(KEPT, None)
        return found

    def settle(self) -> tuple[IntArray, dict[int, str]]:
        """Return the classes of all labels, and the pinned ones with their reasons.

        A check that fails pins its labels, which may make another one fail; this repeats until all hold.
        """
        for name, reason in self.locked.items():
            for labelled in self.dims.values():
                if labelled.tensor == name:
                    self.space.pin(labelled.labels, reason)
        components = self.space.components()
        pending = list(self.checks)
        while True:
            reasons = self.space.reasons(components)
            classes = components.copy()
            if reasons:
                pinned = np.isin(components, list(reasons))
                classes[pinned] = 0
            failed = [(check, reason, labels) for check, reason in pending if (labels := check(classes)) is not None]
            if not failed:
                return components, reasons
            for _, reason, labels in failed:
                self.space.pin(labels, reason)
            pending = [(check, reason) for check, reason in pending if all(check is not f[0] for f in failed)]
