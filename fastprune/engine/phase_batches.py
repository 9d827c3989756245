"""The batches that a phase and its side steps read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastprune.data.data import Data
from fastprune.data.sources import Batch
from fastprune.host.distributed import Distributed
from fastprune.training.phases import Phase, SideSteps

_PHASE = 1_000_000  # added to the epoch per phase, so that no two phases see the samples in the same order
_SIDE = _PHASE // 2  # added to the epoch of side steps


@dataclass(frozen=True)
class PhaseBatches:
    """The batches of one phase, for any position from which a run is resumed.

    Args:
        data: the data set; its training part is read.
        number: index of the phase.
        seed: seed of the run.
        peers: this process among its peers.
    """

    data: Data
    number: int
    seed: int
    peers: Distributed

    def steps(self, work: Phase | SideSteps) -> int:
        """Return the number of batches in one epoch."""
        return self.data.steps("train", work.batch_size, samples=work.samples, distributed=self.peers)

    def read(self, work: Phase | SideSteps, epoch: int, start: int) -> Iterator[Batch]:
        """Read one epoch, from batch ``start`` on."""
        return self.data.batches(
            "train",
            work.batch_size,
            seed=self.seed,
            epoch=self.number * _PHASE + epoch,
            start=start,
            samples=work.samples,
            augment=work.augment,
            distributed=self.peers,
        )

    def side(self, side: SideSteps, done: int) -> Iterator[Batch]:
        """Read the batches of side steps, without end; the first follows step ``done`` of the phase."""
        epoch, start = divmod(done // side.every, self.steps(side))
        while True:
            yield from self.read(side, _SIDE + epoch, start)
            epoch, start = epoch + 1, 0
