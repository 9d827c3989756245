"""The running statistics of batch norms, measured again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastprune.graph.model_state import in_eval_mode
from fastprune.host.distributed import Distributed


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Sequence[Sequence[Tensor]], peers: Distributed) -> int:
    """Replace the running statistics of batch norms by means over all samples, in place; dropout stays off.

    Args:
        model: the network.
        batches: its inputs, batch by batch; under several processes each rank has its share.
        peers: this process among its peers.

    Returns:
        The number of batch norms.

    Raises:
        ValueError: for a synchronised batch norm on several ranks, whose number of batches may differ.
    """
    norms = batch_norms(model)
    if peers.world_size > 1 and any(isinstance(norm, nn.SyncBatchNorm) for norm in norms):
        raise ValueError("bn: synchronised batch norms cannot be measured on several processes; use one process")
    batches = [inputs for inputs in batches if len(inputs[0]) > 1] or batches  # one sample has no variance
    momenta, samples = [norm.momentum for norm in norms], 0
    with in_eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.training = True
        try:
            for inputs in batches:
                samples += len(inputs[0])
                for norm in norms:
                    norm.momentum = len(inputs[0]) / samples  # the mean over the samples so far
                model(*inputs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    total = float(peers.sum_(torch.tensor(float(samples))))
    for norm in norms:
        for tensor in (norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.copy_(peers.sum_(tensor * samples) / total)
    return len(norms)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a network that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def has_batch_norms(model: nn.Module) -> bool:
    """Return whether there are statistics to measure."""
    return bool(batch_norms(model))
