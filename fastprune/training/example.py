"""The example input of a network, taken from a batch of its data."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fastprune.data.nests import count_samples, take
from fastprune.graph.export.inputs import Example
from fastprune.training.objective import Objective

SAMPLES = 2  # the exporter would take a batch of one for a constant


class _Called(BaseException):
    """Carries the arguments of the network's call past a user's ``except Exception``."""


def example_of(objective: Objective, network: nn.Module, batch: tuple[Any, Any]) -> Example:
    """Return what a network is called with on a batch, for its first samples.

    Args:
        objective: how the network runs on a batch.
        network: the network, whose signature names the inputs; it is not run.
        batch: inputs and targets, or a whole batch and None, as ``UserData.first``.

    Raises:
        ValueError: for a batch that only ``forward`` can take apart, or a ``forward`` that does not call the network.
    """

    def keep(*args: Any, **kwargs: Any) -> Any:
        raise _Called(args, kwargs)

    inputs, targets = take(batch, slice(SAMPLES), count_samples(batch))
    try:
        objective.run(keep, inputs, targets)
    except _Called as called:
        args, kwargs = called.args
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"forward: it fails on the first batch: {type(error).__name__}: {error}") from error
    else:
        raise ValueError("forward: it did not call the model, which it gets as its first argument")
    if not kwargs:
        return args[0] if len(args) == 1 else tuple(args)
    try:
        return dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ValueError(f"forward: it calls the model with other arguments than it takes: {error}") from error
