"""The samples of each step and their random numbers: pure functions of (seed, epoch, sample).

Nothing here draws from a stateful generator. So a resumed run, a run on more processes and a run with other workers see
the same samples with the same augmentation, and a start in the middle of an epoch costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastprune.host.distributed import Distributed

Indices = NDArray[np.int64]
Noise = NDArray[np.uint64]
Split = Literal["train", "held_out", "test"]


@dataclass(frozen=True)
class BatchRequest:
    """A request for the batches of one epoch of a data set, or for the rest of them.

    Args:
        split: "train" comes shuffled, "held_out" and "test" in their own order.
        batch_size: samples per batch over all ranks together.
        seed: seed of the run.
        epoch: number of the pass; each has another order and augmentation.
        start: batches to leave out at the beginning, for a resumed run.
        samples: number of random samples to read, the same in every epoch; None, or more than there are = all.
        augment: whether the training augmentation is applied.
        complete: False for training, True for evaluation; see ``BatchPlan``.
        distributed: this process among its peers; it gets its share of every batch.
    """

    split: Split
    batch_size: int
    seed: int = 0
    epoch: int = 0
    start: int = 0
    samples: int | None = None
    augment: bool = False
    complete: bool = False
    distributed: Distributed = field(default_factory=Distributed)


def hashed(seed: int, *keys: int | Indices | Noise) -> Noise:
    """Return 64 random bits per element of the broadcast ``keys``: equal bits for equal (seed, keys).

    SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), once per key.

    Args:
        seed: any integer.
        keys: integers or integer arrays that broadcast together.

    Returns:
        uint64 of the broadcast shape.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.asarray(seed % 2**64, dtype=np.uint64)
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2**64 on purpose
        for key in (0, *keys):
            bits = np.asarray(key).astype(np.uint64)
            state = (state + golden) ^ (bits * np.uint64(0xD6E8FEB86659FD93))
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state, dtype=np.uint64)


def torch_seed(seed: int, *keys: int) -> int:
    """Return a seed for torch's generators, fixed by (seed, keys); it has 63 bits."""
    return int(hashed(seed, *keys) >> np.uint64(1))


def permutation(size: int, seed: int, *keys: int) -> Indices:
    """Return a random order of ``range(size)``, fixed by (seed, keys)."""
    return np.argsort(hashed(seed, *keys, np.arange(size)), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one epoch on one rank.

    All ranks together see every batch as a single process would. Rank r of W gets the samples from r·n // W to
    (r + 1)·n // W of a batch of n, so shares differ by at most one.

    Args:
        order: the samples of the epoch, in order, over all ranks.
        batch_size: samples per batch over all ranks.
        distributed: this process among its peers.
        complete: False for training: a last batch with fewer samples than ranks is left out, so that every rank takes
            part in every step. True for evaluation: every sample is seen once, and a rank may have one batch less.
    """

    order: Indices
    batch_size: int
    distributed: Distributed
    complete: bool = False

    def __post_init__(self) -> None:
        ranks = self.distributed.world_size
        if self.batch_size < ranks:
            raise ValueError(
                f"batch_size {self.batch_size}: it counts the samples of all {ranks} processes together; each of them "
                "needs at least one"
            )
        if len(self.order) < ranks and not self.complete:
            raise ValueError(f"{len(self.order)} samples are too few for {ranks} processes: each needs at least one")

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.batch_size)
        needed = 1 if self.complete else self.distributed.world_size
        return whole + (rest >= needed)

    def __getitem__(self, index: int) -> Indices:
        """Return this rank's samples of batch ``index``."""
        batch = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return batch[share_of(len(batch), self.distributed)]


def share_of(size: int, peers: Distributed) -> slice:
    """Return this rank's part of a batch of ``size`` samples."""
    rank, ranks = peers.rank, peers.world_size
    return slice(rank * size // ranks, (rank + 1) * size // ranks)
