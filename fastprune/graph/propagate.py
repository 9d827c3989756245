"""Run an exported graph on labels in place of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor
from torch.fx import Node

from fastprune.graph.labels import IntArray, LabelSpace, canonical, kept
from fastprune.graph.selection import Origin, Selection

# Given each label's class, does a compact tensor keep its shape here? Returns the labels to pin if it does not.
Check = Callable[[IntArray], Tensor | None]

Role = Literal["out", "in", "depthwise", "channel"]


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of the model, standing for its value while labels flow."""

    name: str
    shape: tuple[int, ...]

    @property
    def layer(self) -> str:
        """The module that owns it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class LabelledDim:
    """The labels of one dimension of one parameter or buffer.

    Args:
        tensor: name in the model's state.
        dim: the dimension.
        labels: one label per index, int64 [size(dim)].
        role: "out" makes channels, "in" reads them, "depthwise" does both, "channel" goes along (batch norm, bias).
    """

    tensor: str
    dim: int
    labels: Tensor
    role: Role


@dataclass(frozen=True)
class Call:
    """One use of a convolution or linear layer.

    Args:
        layer: name of the module that owns the weight.
        kind: the operator, "conv2d" say.
        weight: name of the weight.
        positions: how often each weight is used per sample: output pixels of a convolution.
        node: the graph's node.
        in_labels: labels of the channels that it reads, [channels].
        out_labels: labels of the channels that it makes.
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


@dataclass
class Propagation:
    """What is learnt from running a model's graphs on labels; shared by the eval-mode and the train-mode graph."""

    rewrites: bool = True  # whether the compact network may be a rewritten graph; False = the model's own code runs it
    space: LabelSpace = field(default_factory=LabelSpace)
    dims: dict[tuple[str, int], LabelledDim] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    fixed_macs: int = 0  # of layers that are not understood and stay as they are
    added: list[Tensor] = field(default_factory=list)
    locked: dict[str, str] = field(default_factory=dict)
    checks: list[tuple[Check, str]] = field(default_factory=list)
    origins: dict[Node, Origin] = field(default_factory=dict)  # of values whose channels lie along several dimensions
    selections: dict[Node, list[Selection]] = field(
        default_factory=dict
    )  # for each result of a move that takes channels

    def label_dim(self, weight: Weight, dim: int, labels: Tensor, role: Role, reason: str) -> None:
        """Say that index j of ``weight`` along ``dim`` belongs to channel ``labels[j]``."""
        known = self.dims.get((weight.name, dim))
        if known is None:
            self.dims[weight.name, dim] = LabelledDim(weight.name, dim, labels, role)
        else:
            self.space.unite(known.labels, labels, reason)
            self.require_role(known, role, reason)

    def require_role(self, known: LabelledDim, role: Role, reason: str) -> None:
        """Keep a dimension that has two meanings: a weight tied to its transpose makes channels where it reads some."""
        if role != known.role:
            self.space.pin(known.labels, f"{reason} (uses {known.tensor} in another way elsewhere)")

    def fresh_dim(self, weight: Weight, dim: int, role: Role, reason: str, *, repeat: int = 1) -> Tensor:
        """New labels for ``weight`` along ``dim`` (the known ones where the weight was met before).

        With ``repeat`` > 1 the labels of the first ``size / repeat`` indices are used again for the others.
        """
        known = self.dims.get((weight.name, dim))
        if known is not None:
            rows = known.labels.reshape(repeat, -1)
            self.space.unite(rows[:1].expand_as(rows), rows, f"{reason} (grouped)")
            self.require_role(known, role, reason)
            return known.labels
        labels = self.space.fresh(weight.shape[dim] // repeat).repeat(repeat)
        self.dims[weight.name, dim] = LabelledDim(weight.name, dim, labels, role)
        return labels

    def labels_of(self, weight: Weight, reason: str) -> Tensor:
        """A weight that is used as a value: labelled along its one dimension, kept as a whole if it has several."""
        wide = [dim for dim, size in enumerate(weight.shape) if size > 1]
        if len(wide) == 1:
            labels = self.fresh_dim(weight, wide[0], "channel", reason)
            shape = [1] * len(weight.shape)
            shape[wide[0]] = -1
            return canonical(labels.reshape(shape))
        if wide:
            self.locked.setdefault(weight.name, reason)
        return kept(weight.shape)

    def settle(self) -> tuple[IntArray, dict[int, str]]:
        """The classes of all labels, and the pinned ones with their reasons.

        A check that fails pins its labels, which may make another one fail: repeated until all hold.
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
