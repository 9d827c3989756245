"""One interface for one process and for many: rank, world size and the collectives that the project needs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Distributed:
    """This process among its peers.

    With a world of one every collective is the identity, so callers are written once for N ranks.

    Args:
        rank: index of this process, 0 ≤ rank < world_size.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @staticmethod
    def from_environment() -> Distributed:
        """Join the process group that ``torchrun`` announces in the environment; without it, return a world of one.

        NCCL carries CUDA tensors and gloo carries CPU tensors, so that small values that ranks must agree on (a stop
        signal, the number of a checkpoint) can stay on the CPU. Joining twice is harmless.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return Distributed()
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return Distributed(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes files."""
        return self.rank == 0

    def mean_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its mean over all ranks, in place; every rank gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by that of rank 0, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world_size > 1:
            dist.barrier()

    @staticmethod
    def leave() -> None:
        """Leave the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
            # A gloo thread drops the tensors of the last collective after it has woken us. It needs the interpreter for
            # that, and aborts the process (seen with torch 2.15) if the interpreter is gone by then: let it run.
            time.sleep(0.2)
