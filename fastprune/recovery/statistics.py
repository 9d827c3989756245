"""The running statistics of batch norms, measured again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastprune.host.distributed import Distributed


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Sequence[Sequence[Tensor]], peers: Distributed) -> int:
    """Replace the running statistics of batch norms by means over batches, in place; dropout stays off.

    Args:
        model: the network.
        batches: its inputs, batch by batch; under several processes each rank has its share.
        peers: this process among its peers.

    Returns:
        The number of batch norms.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    modes, momenta = [m.training for m in norms], [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None  # None: the mean over all batches
    try:
        for inputs in batches:
            model(*inputs)
    finally:
        for norm, training, momentum in zip(norms, modes, momenta, strict=True):
            norm.training, norm.momentum = training, momentum
    for norm in norms:
        for tensor in (norm.running_mean, norm.running_var):
            assert tensor is not None
            peers.mean_(tensor)
    return len(norms)
