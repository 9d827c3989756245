"""Phases: the stretches of a method's work, which the engine's loop runs step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Metrics = Mapping[str, float | Tensor]


Step = Callable[[Tensor, Tensor], Metrics]
"""What happens to one batch: images [N, C, H, W], labels [N] on the task's device; returns the metrics to log."""


@dataclass(frozen=True)
class SideSteps:
    """Steps in the midst of a phase, on samples of their own.

    Args:
        every: how many steps of the phase come before each of these.
        step: called as a phase's.
        samples: as a phase's. Drawn by the run's seed alone: as many samples are the same samples everywhere.
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
    """One stretch of a method's work: batches of training data, one ``step`` per batch.

    Args:
        name: shown in the progress bar and in ``metrics.jsonl``.
        epochs: passes over the samples.
        step: called with ``(images [N, C, H, W], labels [N])`` on the task's device; returns the metrics to log.
        samples: how many random training samples the phase sees, drawn once by the run's seed; None = all of them.
        batch_size: samples per step over all ranks together.
        augment: whether the training augmentation is applied.
        end_epoch: called after each epoch with its number, from 0; returns the metrics to log.
        beside: other steps in the midst of these.

    A metric named ``family/member`` (``keep/layer1.0.conv1``) is one of many of its kind: it is written to
    ``metrics.jsonl`` and nowhere else, neither to the progress bar nor to the results.
    """

    name: str
    epochs: int
    step: Step
    samples: int | None = None
    batch_size: int = 256
    augment: bool = False
    end_epoch: Callable[[int], Metrics] | None = None
    beside: SideSteps | None = None


@dataclass(frozen=True)
class Rounds:
    """One stretch of a method's work that reads no batches: rounds, until ``progress`` says that all is done.

    Args:
        name: as a phase's.
        round: called again and again, with no arguments; returns the metrics to log. The run can be stopped, and is
            saved, between two rounds.
        progress: how much is done, and how much there is; the same on every rank. The latter may grow.
    """

    name: str
    round: Callable[[], Metrics]
    progress: Callable[[], tuple[int, int]]
