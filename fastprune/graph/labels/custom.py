"""Rules for users' own operators: the public part of label propagation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Size, Tensor

from fastprune.graph.labels.labels import spread, vector_along
from fastprune.graph.labels.layers import record_call
from fastprune.graph.labels.propagate import Weight
from fastprune.graph.labels.rules import RULES, Context, give_up


class NotUnderstoodError(Exception):
    """Channels lie along another dimension than a rule expects, so the operator keeps them."""


class Operator:
    """One use of an operator, as its rule sees it.

    A rule says where the channels are that the operator reads and makes. Labels tell channels apart: an int64 vector
    holds one label for each channel. If channels lie along other dimensions than a rule expects, the rule ends and all
    channels that the operator touches stay: never wrong, at most less prunable.

    Args:
        context: the node and the findings so far.
        args: the operator's arguments; labels in place of tensors, a ``Weight`` in place of a parameter.
        kwargs: the operator's arguments by name.
    """

    def __init__(self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._context, self._args, self._kwargs = context, args, kwargs

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the operator's result on the example."""
        return self._context.shape  # type: ignore[no-any-return]

    def channels(self, x: Any, dim: int) -> Tensor:
        """Return the labels of the channels of ``x`` along ``dim``; the rule ends if they lie along another one."""
        labels = self._context.state.labels_of(x, self._context.reason) if isinstance(x, Weight) else x
        vector = vector_along(labels, dim % labels.dim()) if isinstance(labels, Tensor) else None
        if vector is None:
            raise NotUnderstoodError
        return vector

    def layer(self, x: Any, weight: Any, *, dim: int, reads: int, makes: int) -> Tensor:
        """Declare that the operator sums over channels of ``x`` and makes others, as convolutions and linear layers do.

        Args:
            x: its first argument; the channels lie along ``dim``.
            weight: a parameter or buffer with the channels of ``x`` along ``reads``, and the new channels along
                ``makes``. Each element counts as one multiply-accumulate for each element of the result that has the
                same channel.
            dim: the dimension of ``x`` and of the result that holds the channels.
            reads: the dimension of ``weight`` that holds the channels of ``x``.
            makes: the dimension of ``weight`` that holds the new channels.

        Returns:
            The labels of the new channels.
        """
        channels = self.channels(x, dim)
        if x is not self._args[0] or not isinstance(weight, Weight) or weight.shape[reads] != len(channels):
            raise NotUnderstoodError
        context, state = self._context, self._context.state
        state.label_dim(weight, reads, channels, "in", context.reason)
        made = state.fresh_dim(weight, makes, "out", context.reason)
        positions = Size(self.shape).numel() // self.shape[dim] // context.batch
        record_call(context, weight, positions, channels, made, channel_dim=dim % x.dim(), depthwise=False)
        return made

    def goes_with(self, weight: Any, dim: int, channels: Tensor) -> None:
        """Declare that ``weight`` (scale, bias, statistics; None for none) has one index per channel along ``dim``."""
        if isinstance(weight, Weight) and weight.shape[dim] == len(channels):
            self._context.state.label_dim(weight, dim, channels, "channel", self._context.reason)
        elif weight is not None:
            raise NotUnderstoodError

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Declare that channels leave together: the first of one vector with the first of the other, and so on."""
        if first.shape != second.shape:
            raise NotUnderstoodError
        self._context.state.space.unite(first, second, self._context.reason)

    def result(self, channels: Tensor, dim: int) -> Tensor:
        """Return the labels of a result with these channels along ``dim``."""
        if self.shape[dim] != len(channels):
            raise NotUnderstoodError
        return spread(channels, self.shape, dim % len(self.shape))

    def pin(self) -> Any:
        """Return a result without prunable channels; all channels that the operator reads stay, too."""
        return give_up(self._context, self._args, self._kwargs)


CustomRule = Callable[..., Any]


def rule(name: str) -> Callable[[CustomRule], CustomRule]:
    """Register a function as the rule of an operator; see ``docs/custom_operators.md``.

    Args:
        name: "namespace::operator", as the operator was defined by ``torch.library``.

    Returns:
        A decorator for a function that takes an ``Operator`` and the operator's arguments, and returns the labels of
        its result.

    Raises:
        ValueError: if the name has no namespace, or is that of one of PyTorch's own operators.
    """
    namespace, _, operator = name.partition("::")
    if not namespace or not operator or namespace == "aten":
        raise ValueError(f"rule {name!r}: give the name of an operator of your own, 'namespace::operator'")

    def register(function: CustomRule) -> CustomRule:
        def apply(context: Context, *args: Any, **kwargs: Any) -> Any:
            seen = Operator(context, args, kwargs)
            try:
                return function(seen, *args, **kwargs)
            except NotUnderstoodError:
                return seen.pin()

        RULES[name.rstrip("_")] = apply
        return function

    return register
