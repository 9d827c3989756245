"""Calibration inputs: what the network gets, taken from the training data without augmentation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastprune.data import Data
from fastprune.engine import Placement
from fastprune.graph import ChannelGraph
from fastprune.graph.export.inputs import Inputs
from fastprune.graph.model_state import in_eval_mode
from fastprune.host.distributed import Distributed
from fastprune.training.objective import Objective

BATCH = 32  # samples of a batch of each process


class Recorder:
    """Stands for a network and keeps the inputs of every call, in the order in which the graph takes them.

    Args:
        network: the network.
        inputs: the inputs with which it was traced.
    """

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        self.network, self.inputs = network, inputs
        self.signature = inspect.signature(network.forward)
        self.names = list(self.signature.bind(*inputs.args, **inputs.kwargs).arguments)
        self.seen: list[list[Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network.

        Raises:
            ValueError: for other arguments, or samples of another shape or dtype, than those of the trace.
        """
        given = self.signature.bind(*args, **kwargs).arguments
        tensors = [x for x in pytree.tree_leaves(dict(given)) if isinstance(x, Tensor)]
        found = [(tuple(x.shape[1:]), x.dtype) for x in tensors]
        wanted = [(tuple(x.shape[1:]), x.dtype) for x in self.inputs.tensors]
        if list(given) != self.names or found != wanted:
            raise ValueError(
                f"compensate: the data give {self.describe(list(given), found)}, the network was traced with "
                f"{self.describe(self.names, wanted)}; give both in the same form"
            )
        self.seen.append(tensors)
        return self.network(*args, **kwargs)

    @staticmethod
    def describe(names: list[str], kinds: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
        """Return arguments in words."""
        shapes = ", ".join(f"{'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}" for shape, dtype in kinds)
        return f"{', '.join(names)} of {shapes}"


@torch.no_grad()
def calibration_inputs(
    graph: ChannelGraph,
    network: nn.Module,
    data: Data,
    images: int,
    *,
    seed: int = 0,
    placement: Placement | None = None,
    objective: Objective | None = None,
    peers: Distributed | None = None,
) -> list[list[Tensor]]:
    """Return the inputs that the network gets for some training samples, batch by batch.

    Args:
        graph: the channel graph of the network.
        network: the network.
        data: the data set.
        images: number of samples over all processes together.
        seed: seed of the choice.
        placement: where the network computes.
        objective: how the network runs on a batch.
        peers: this process among its peers, which share the samples.

    Raises:
        ValueError: if there are no samples, or if batches have another size than the only one the network's graph
            holds for.
    """
    peers = peers or Distributed()
    place, aim, recorder = placement or Placement(), objective or Objective(), Recorder(network, graph.traced.inputs)
    size = BATCH if graph.traced.any_batch else graph.traced.inputs.batch
    batches = data.batches("train", size * peers.world_size, seed=seed, samples=images, distributed=peers)
    with in_eval_mode(network):
        for inputs, targets in batches:
            aim.run(recorder, place.images(inputs), place.labels(targets))
    seen = [inputs for inputs in recorder.seen if graph.traced.any_batch or len(inputs[0]) == size]
    if int(peers.sum_(torch.tensor([int(bool(seen))]))) < peers.world_size:  # all ranks raise, so that none waits
        only = "" if graph.traced.any_batch else f" of {size}, the only batch size that this network was traced for"
        raise ValueError(
            f"compensate: data {data.name!r} gave no calibration batch{only}; give a loader with more samples"
        )
    return seen
