"""Learning rates as pure functions of the step, so that a resumed run needs no scheduler's state."""

from __future__ import annotations

import math
from collections.abc import Sequence

SCHEDULES = ("milestones", "cosine", "linear", "constant")


def learning_rate(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    lr: float,
    schedule: str = "milestones",
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
    warmup_epochs: float = 0.0,
) -> float:
    """Return the learning rate of step ``step``.

    During the warm-up it rises linearly to ``lr``, which the last step of the warm-up reaches. After it, "milestones"
    multiplies by ``gamma`` from each milestone on; "cosine" and "linear" fall to zero over the steps that are left.

    Args:
        step: number of the step, from 0.
        steps_per_epoch: steps of one epoch.
        epochs: epochs of the whole training.
        lr: the largest value.
        schedule: "milestones", "cosine", "linear" or "constant".
        milestones: epochs, or fractions of ``epochs`` if below 1.
        gamma: factor at each milestone.
        warmup_epochs: length of the warm-up, in epochs.

    Returns:
        The learning rate.

    Raises:
        ValueError: for an unknown schedule.

    >>> [round(learning_rate(step, steps_per_epoch=1, epochs=4, lr=1.0), 6) for step in range(4)]
    [1.0, 1.0, 0.1, 0.01]
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: give one of {', '.join(SCHEDULES)}")
    warmup = round(warmup_epochs * steps_per_epoch)
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(epochs * steps_per_epoch - warmup, 1)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "constant":
        return lr
    epoch = step / steps_per_epoch + 1e-9  # a milestone such as 0.7 × 10 is a little above 7 in floating point
    passed = sum(epoch >= (milestone * epochs if milestone < 1 else milestone) for milestone in milestones)
    return float(lr * gamma**passed)
