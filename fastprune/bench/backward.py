"""The backward pass node by node, for tensors without memory: torch's engine needs the device that they are on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def run_backward(loss: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Call every node of the gradient's graph once, as torch's engine does, which needs a device.

    Returns:
        The leaves that require gradients, each with its gradient.
    """
    assert loss.grad_fn is not None
    leaves = []
    gradients: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in in_order(loss.grad_fn):
        given = gradients.pop(node, None)
        if given is None:  # no gradient reaches it
            continue
        if hasattr(node, "variable"):
            assert given[0] is not None
            leaves.append((node.variable, given[0]))
            continue
        for (target, number), gradient in zip(*call(node, given), strict=True):
            if target is not None and gradient is not None:
                add_gradient(gradients, target, number, gradient)
    return leaves


def call(node: Any, gradients: Sequence[Tensor | None]) -> tuple[Sequence[tuple[Any, int]], Sequence[Tensor | None]]:
    """Return the places that a node hands gradients to, and these."""
    places = node.next_functions
    if not hasattr(node, "apply"):
        found = node(*gradients)
        return places, found if isinstance(found, tuple) else (found,)
    # An autograd.Function returns one for each argument, but has places for tensors alone.
    results = zip(gradients, node._input_metadata, strict=True)
    found = node.apply(*(torch.zeros(r.shape, dtype=r.dtype, device=r.device) if g is None else g for g, r in results))
    found = found if isinstance(found, tuple) else (found,)
    wanted = [gradient for gradient, wants in zip(found, node.needs_input_grad, strict=True) if wants]
    return [place for place in places if place[0] is not None], wanted


def in_order(root: Any) -> Sequence[Any]:
    """Return the nodes of a gradient's graph, each before those that it hands gradients to."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(target, False) for target, _ in node.next_functions if target is not None]
    return order[::-1]


def add_gradient(gradients: dict[Any, list[Tensor | None]], node: Any, number: int, gradient: Tensor) -> None:
    """Add a gradient to those of a node's results, in the shape and dtype of that result."""
    results = node._input_metadata
    own = gradients.setdefault(node, [None] * len(results))
    gradient = gradient.sum_to_size(results[number].shape).to(results[number].dtype)
    before = own[number]
    own[number] = gradient if before is None else before + gradient
