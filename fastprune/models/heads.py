"""The classifier of a network: the tensors whose sizes follow the number of classes, and a new one in its place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from fastprune.models.weights import fit, read_weights

log = logging.getLogger(__name__)

Build = Callable[[int], nn.Module]
"""What builds a network for a number of classes."""


def outline(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network without values, on the meta device; with values where its code needs them."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (RuntimeError, NotImplementedError):  # code that reads values while it builds
            return build()


def find_head(name: str, build: Build, num_classes: int) -> frozenset[str]:
    """Return the names of the classifier's tensors, auxiliary classifiers included.

    Args:
        name: what the user calls the network, for messages.
        build: what builds it.
        num_classes: size of the output.

    Raises:
        ValueError: if no tensor's size follows the number of classes.
    """
    here, there = (
        {name: tensor.shape for name, tensor in outline(lambda: build(count)).state_dict().items()}  # noqa: B023
        for count in (num_classes, num_classes + 1)
    )
    found = frozenset(key for key in here if here[key] != there.get(key))
    if not found:
        raise ValueError(
            f"num_classes {num_classes}: no weight of model {name!r} is of that size, so it has no classifier to "
            "replace; give a network whose last layer scores classes, or leave num_classes out"
        )
    return found


def load_body(
    model: nn.Module, path: str | Path, find: Callable[[], frozenset[str]], *, ema: bool = False, always: bool = True
) -> None:
    """Load weights as ``load_weights`` does, without those of the classifier, which stays as it is.

    Args:
        model: the network, changed in place.
        path: a file for ``read_weights``.
        find: returns the names of the classifier's tensors.
        ema: as in ``read_weights``.
        always: whether the classifier stays even if that of the file fits.

    Raises:
        ValueError: as in ``load_weights``.
    """

    def leave_out(misfits: Collection[str]) -> Collection[str]:
        if not (always or misfits):
            return ()
        head = find()
        return head if always or not head.isdisjoint(misfits) else ()

    kept = fit(model, read_weights(path, ema=ema), str(path), leave_out)
    if kept:
        log.info("weights %s: took all but the classifier (%s), which is new", path, ", ".join(sorted(kept)))


def transplant(model: nn.Module, donor: nn.Module, head: Collection[str]) -> None:
    """Put another network's classifier in place of a network's own; auxiliary ones only where it has them.

    Args:
        model: the network, changed in place.
        donor: the same network for other classes.
        head: the names of the classifier's tensors.
    """
    for place in sorted({name.rpartition(".")[0] for name in head}):
        try:
            model.get_submodule(place)
        except AttributeError:
            continue
        model.set_submodule(place, donor.get_submodule(place))
