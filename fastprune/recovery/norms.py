"""Statistics of batch norms with which the outputs of a changed network have the moments that they had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Node

from fastprune.graph import ChannelGraph
from fastprune.graph.export.nodes import argument_of
from fastprune.graph.model_state import state_of
from fastprune.host import progress
from fastprune.host.distributed import Distributed
from fastprune.networks.chains import is_stored
from fastprune.recovery.room import Room
from fastprune.recovery.walk import Values, Walk

aten = torch.ops.aten

SMALL_VARIANCE = 1e-6  # of the largest; a channel that varies less keeps its variance and is only shifted


@torch.no_grad()
def match_norms(
    graph: ChannelGraph,
    model: nn.Module,
    changed: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    peers: Distributed,
    room: Room,
) -> None:
    """Set running means and variances so that every batch norm returns the means and variances of the full network.

    With the moments m, v of a norm's inputs in the full network and m', v' in the changed one, its running mean μ and
    variance σ² become σ'² + ε = (σ² + ε) v'/v and μ' = m' − (m − μ) √((σ'² + ε) / (σ² + ε)). Norms are matched one
    after the other, each on what the ones in front of it have become. Statistics that several norms share stay.

    Args:
        graph: the channel graph of the model.
        model: the full model.
        changed: the changed one, of the same structure; its statistics change in place.
        batches: the inputs of each batch; under several processes each rank has its share.
        peers: this process among its peers.
        room: the memory that the values between layers may take.
    """
    original, tensors = state_of(model), state_of(changed)
    walk = Walk(graph, model, changed, batches, room=room)
    walk.changed |= {name for name, tensor in tensors.items() if not torch.equal(tensor, original[name])}
    found = {node: names for node in walk.nodes if (names := statistics_of(node)) is not None}
    uses = Counter(name for names in found.values() for name in names)
    with progress.begin("matching batch norms", len(walk.nodes)) as shown:
        for node in walk.steps():
            shown.advance(1)
            names = found.get(node)
            if names is None or not walk.differs(node) or any(uses[name] > 1 for name in names):
                continue
            assert walk.other is not None
            full, other = (moments(values, node, peers) for values in (walk.full, walk.other))
            mean, variance = (original[name].double() for name in names)
            matched = match(full, other, mean, variance, float(argument_of(node, "eps")))
            for name, value in zip(names, matched, strict=True):
                tensors[name].copy_(value)
            walk.changed.update(names)


def statistics_of(node: Node) -> tuple[str, str] | None:
    """Return the names of a batch norm's running mean and variance; None for other nodes, or if it has none."""
    if node.target is not aten.batch_norm.default:
        return None
    mean, variance = argument_of(node, "running_mean"), argument_of(node, "running_var")
    return (str(mean.target), str(variance.target)) if is_stored(mean) and is_stored(variance) else None


def moments(values: Values, node: Node, peers: Distributed) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel of a node's input, over all batches of all ranks, float64 [C]."""
    sums = None
    for batch in range(values.count):
        x = values.argument(node, batch).double().movedim(1, 0).flatten(1)
        part = torch.stack([x.sum(1), x.square().sum(1), torch.full_like(x[:, 0], x.shape[1])])
        sums = part if sums is None else sums + part
    assert sums is not None
    total, squares, count = peers.sum_(sums)
    return total / count, (squares / count - (total / count).square()).clamp(min=0)


def match(
    full: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return running mean and variance that give inputs of ``other`` moments the outputs' moments of ``full``."""
    varies = (full[1] > SMALL_VARIANCE * full[1].max()) & (other[1] > SMALL_VARIANCE * other[1].max())
    ratio = torch.where(varies, other[1] / torch.where(varies, full[1], 1.0), 1.0)
    new = ((variance + epsilon) * ratio - epsilon).clamp(min=0)
    scale = ((new + epsilon) / (variance + epsilon)).sqrt()
    return other[0] - (full[0] - mean) * scale, new
