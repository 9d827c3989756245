"""Phases: the parts of a method's work, which the engine's loop runs step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Metrics = Mapping[str, float | Tensor]


Step = Callable[[Any, Any], Metrics]
"""The work on one batch: images [N, C, H, W], labels [N] on the task's device; returns the metrics to log.

With data of a user's own, inputs and targets may be any nest of tensors; ``training.objective`` runs networks on them.
"""


class PhaseRunner(Protocol):
    """The caller of phases: the engine's loop, which runs each kind in its own way."""

    def run_epochs(self, phase: Phase) -> None:
        """Call ``step`` for every batch of every epoch."""

    def run_rounds(self, phase: Rounds) -> None:
        """Call ``round`` until ``progress`` says that all is done."""


@dataclass(frozen=True)
class SideSteps:
    """Steps between those of a phase, on samples of their own.

    Args:
        every: number of steps of the phase before each side step.
        step: as a phase's.
        samples: as a phase's; drawn by the run's seed alone, so an equal number means the same samples everywhere.
        batch_size: as a phase's.
        augment: as a phase's.
    """

    every: int
    step: Step
    samples: int | None = None
    batch_size: int = 256
    augment: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every {self.every}: at least 1 step must come before each side step")


@dataclass(frozen=True)
class Phase:
    """A part of a method's work that reads training data: one ``step`` per batch.

    Args:
        name: name in the progress bar and in ``metrics.jsonl``.
        epochs: passes over the samples.
        step: called with ``(images [N, C, H, W], labels [N])`` on the task's device; returns the metrics to log.
        samples: number of random training samples, drawn once by the run's seed; None = all of them.
        batch_size: samples per step over all ranks together.
        augment: whether the training augmentation is applied.
        end_epoch: called after each epoch with its number, from 0; returns the metrics to log.
        beside: side steps; None = none.

    A metric named ``family/member`` (``keep/layer1.0.conv1``) is one of many of its kind: it is written to
    ``metrics.jsonl`` only, not to the progress bar or the results.
    """

    name: str
    epochs: int
    step: Step
    samples: int | None = None
    batch_size: int = 256
    augment: bool = False
    end_epoch: Callable[[int], Metrics] | None = None
    beside: SideSteps | None = None

    def run(self, runner: PhaseRunner) -> None:
        """Have ``runner`` go through the epochs."""
        runner.run_epochs(self)


@dataclass(frozen=True)
class Rounds:
    """A part of a method's work that reads no batches: rounds, until ``progress`` says that all is done.

    Args:
        name: as a phase's.
        round: called again and again, without arguments; returns the metrics to log. The run is saved, and can be
            stopped, between two rounds.
        progress: returns the amount done and the whole amount, the same on every rank. The latter may grow.
    """

    name: str
    round: Callable[[], Metrics]
    progress: Callable[[], tuple[int, int]]

    def run(self, runner: PhaseRunner) -> None:
        """Have ``runner`` go through the rounds."""
        runner.run_rounds(self)
