"""The loop: phases × epochs × steps, for the search of every method and for training alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from fastprune.data.batches import hashed
from fastprune.data.data import Data
from fastprune.data.sources import Batch
from fastprune.engine.checkpoint import Checkpoints
from fastprune.engine.device import Placement
from fastprune.engine.interruption import Interruption
from fastprune.engine.meter import Meter, NonFiniteError
from fastprune.engine.progress import ProgressBar
from fastprune.engine.run import RunDirectory
from fastprune.host.distributed import Distributed
from fastprune.host.errors import Interrupted
from fastprune.options import check, option
from fastprune.training.phases import Phase, Rounds


class LoopTask(Protocol):
    """What the loop needs of a task; ``fastprune.methods.contract.Task`` has it."""

    model: nn.Module
    device: torch.device
    seed: int
    distributed: Distributed
    rng: torch.Generator


T = TypeVar("T", bound=LoopTask)
T_contra = TypeVar("T_contra", bound=LoopTask, contravariant=True)


class Worker(Protocol[T_contra]):
    """What the loop drives: a ``Method``, or the ``Trainer``. ``trains_weights`` may be absent, which means False."""

    def phases(self, task: T_contra) -> Iterator[Phase | Rounds]:
        """The phases, in order; the same on every call."""

    def state_dict(self) -> dict[str, Any]:
        """All state beside the model's."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


@dataclass(frozen=True)
class LoopOptions:
    """How often the loop writes."""

    log_every: int = option(50, "steps between two lines of metrics.jsonl", minimum=1)
    checkpoint_seconds: float = option(
        300.0, "seconds between two checkpoints, rounded up to the next line of the log", minimum=0.0
    )
    checkpoint_epochs: int = option(1, "epochs between two checkpoints; 0 = by time only", minimum=0)
    checkpoint_steps: int = option(0, "steps between two checkpoints; 0 = by time only", minimum=0)
    progress: bool = option(True, "show a progress bar, if standard error is a terminal")

    def __post_init__(self) -> None:
        check(self)


_PHASE = 1_000_000  # added to the epoch per phase, so that no two phases see the samples in the same order
_BESIDE = _PHASE // 2  # added to the epoch of a phase's side steps


@dataclass
class Position:
    """How far a run has come: ``step`` counts within the epoch, ``total`` from the start."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    total: int = 0
    finished: bool = False


def run_phases(
    worker: Worker[T],
    task: T,
    data: Data | None,
    *,
    run: RunDirectory | None = None,
    stage: str = "search",
    resume: bool = False,
    placement: Placement | None = None,
    options: LoopOptions | None = None,
) -> dict[str, float]:
    """Run all phases of ``worker``; a run that is stopped anywhere and resumed ends with the same bits.

    Before each step torch's default generators are seeded from (seed, step), so that dropout needs no saved state.

    Args:
        worker: gives the phases; all its state is in ``state_dict`` (and in the model's, with ``trains_weights``).
        task: handed to ``worker.phases``; its ``rng`` is saved and restored.
        data: where batches come from; may be None for a worker without phases.
        run: where the log and the checkpoints go; nothing is written where None.
        stage: names the checkpoints and the lines of the log.
        resume: continue from the newest checkpoint of ``stage`` in ``run``, if there is one.
        placement: device, precision and layout; the task's device in float32 where None.
        options: how often to write.

    Returns:
        The last value of every metric, without families (names with a slash, see ``Phase``).

    Raises:
        Interrupted: after SIGINT or SIGTERM, with a checkpoint written.
        NonFiniteError: where a loss is infinite or not a number; no checkpoint has it.
        ValueError: where the worker has phases but ``data`` is None.
    """
    options = options or LoopOptions()
    placement = placement or Placement(task.device)
    peers = task.distributed
    position, meter = Position(), Meter(placement.device)
    latest: dict[str, float] = {}
    saver = _Saver(worker, task, position, meter, latest, run, stage)
    if not (resume and saver.restore()):
        saver.begin()

    def record(phase: Phase | Rounds, metrics: Mapping[str, float]) -> None:
        latest.update({name: value for name, value in metrics.items() if "/" not in name})
        if run is not None and metrics:
            run.log({"stage": stage, "phase": phase.name, "epoch": position.epoch, "step": position.total, **metrics})

    def means(phase: Phase) -> dict[str, float]:
        try:
            return meter.reduce(peers)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{stage} stopped in phase {phase.name!r}, epoch {position.epoch}, at step {position.total}: {error}; "
                "lower the learning rate, or look for wrong values in the data"
            ) from error

    def stop_if_asked() -> None:
        if interruption.agreed(peers):
            saver.save()
            where = f"; resume it from {run.path}" if run else ""
            raise Interrupted(f"{stage} was interrupted at step {position.total}{where}")

    def run_rounds(phase: Rounds) -> None:
        done, total = phase.progress()
        bar.start(phase.name, 1, total, 0, done)
        while done < total:
            torch.manual_seed(int(hashed(task.seed, position.total) >> np.uint64(1)))
            with placement.autocast():
                metrics = {name: float(value) for name, value in phase.round().items()}
            position.total += 1
            record(phase, metrics)
            done, total = phase.progress()
            bar.update(done, total, latest)
            if saver.seconds > options.checkpoint_seconds or (
                options.checkpoint_steps and position.total % options.checkpoint_steps == 0
            ):
                saver.save()
            stop_if_asked()

    with Interruption() as interruption, ProgressBar(options.progress and peers.is_main) as bar:
        for number, phase in enumerate(worker.phases(task)):
            if number < position.phase or position.finished:
                continue
            if isinstance(phase, Rounds):
                run_rounds(phase)
                position.phase = number + 1
                saver.save()
                continue
            if data is None:
                raise ValueError(f"phase {phase.name!r} reads training data, but no data were given")
            steps = data.steps("train", phase.batch_size, samples=phase.samples, distributed=peers)
            beside = side_batches(phase, data, task, number, position.epoch * steps + position.step)
            bar.start(phase.name, phase.epochs, steps, position.epoch, position.step)
            while position.epoch < phase.epochs:
                batches = data.batches(
                    "train",
                    phase.batch_size,
                    seed=task.seed,
                    epoch=number * _PHASE + position.epoch,
                    start=position.step,
                    samples=phase.samples,
                    augment=phase.augment,
                    distributed=peers,
                )
                for images, labels in batches:
                    torch.manual_seed(int(hashed(task.seed, position.total) >> np.uint64(1)))
                    with placement.autocast():
                        meter.add(phase.step(placement.images(images), placement.labels(labels)))
                    position.step += 1
                    position.total += 1
                    if phase.beside and (position.epoch * steps + position.step) % phase.beside.every == 0:
                        images, labels = next(beside)
                        with placement.autocast():
                            meter.add(phase.beside.step(placement.images(images), placement.labels(labels)))
                    bar.advance(latest)

                    log_now = position.total % options.log_every == 0
                    save_now = options.checkpoint_steps > 0 and position.total % options.checkpoint_steps == 0
                    # Many ranks stop only where all of them look, at the lines of the log; one alone stops at once.
                    stop_now = log_now or (peers.world_size == 1 and interruption.requested)
                    if log_now or save_now or stop_now:
                        values = means(phase)
                        if log_now:
                            record(phase, values)
                            meter.reset()
                        if save_now or saver.seconds > options.checkpoint_seconds:
                            saver.save()
                        if stop_now:
                            stop_if_asked()

                values = means(phase)
                if phase.end_epoch is not None:
                    values |= {name: float(value) for name, value in phase.end_epoch(position.epoch).items()}
                record(phase, values)
                meter.reset()
                position.epoch += 1
                position.step = 0
                if (
                    options.checkpoint_epochs and position.epoch % options.checkpoint_epochs == 0
                ) or saver.seconds > options.checkpoint_seconds:
                    saver.save()
                stop_if_asked()
            position.phase, position.epoch = number + 1, 0
        if not position.finished:
            position.finished = True
            saver.save()
    return latest


def side_batches(phase: Phase, data: Data, task: LoopTask, number: int, done: int) -> Iterator[Batch]:
    """The batches of a phase's side steps, without end; the first is the one after ``done`` steps of the phase."""
    side = phase.beside
    if side is None:
        return
    steps = data.steps("train", side.batch_size, samples=side.samples, distributed=task.distributed)
    epoch, start = divmod(done // side.every, steps)
    while True:
        yield from data.batches(
            "train",
            side.batch_size,
            seed=task.seed,
            epoch=number * _PHASE + _BESIDE + epoch,
            start=start,
            samples=side.samples,
            augment=side.augment,
            distributed=task.distributed,
        )
        epoch, start = epoch + 1, 0


class _Saver:
    """Gathers and restores everything that a resumed run needs."""

    def __init__(
        self,
        worker: Worker[T],
        task: T,
        position: Position,
        meter: Meter,
        latest: dict[str, float],
        run: RunDirectory | None,
        stage: str,
    ) -> None:
        self.worker = worker
        self.task = task
        self.position = position
        self.meter = meter
        self.latest = latest
        self.run = run
        self.checkpoints = Checkpoints(run.checkpoints_path(stage), task.distributed) if run else None
        self.trains_weights = bool(getattr(worker, "trains_weights", False))
        self.saved_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the last checkpoint."""
        return time.monotonic() - self.saved_at

    def begin(self) -> None:
        """Start anew. The checkpoint of step 0 says which lines of the log came before this stage."""
        if self.checkpoints is not None:
            self.checkpoints.clear()
        self.save()

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        self.saved_at = time.monotonic()
        if self.checkpoints is None or self.run is None or not self.task.distributed.is_main:
            return
        state = {
            "worker": self.worker.state_dict(),
            "model": self.task.model.state_dict() if self.trains_weights else None,
            "position": asdict(self.position),
            "meter": self.meter.state_dict(),
            "latest": self.latest,
            "rng": self.task.rng.get_state(),
            "metrics_size": self.run.metrics_size(),
        }
        self.checkpoints.save(self.position.total, state)

    def restore(self) -> bool:
        """Load the newest checkpoint; False where there is none."""
        state = self.checkpoints.load_latest() if self.checkpoints else None
        if state is None or self.run is None:
            return False
        self.worker.load_state_dict(state["worker"])
        if self.trains_weights:
            self.task.model.load_state_dict(state["model"])
        for name, value in state["position"].items():
            setattr(self.position, name, value)
        self.meter.load_state_dict(state["meter"])
        self.latest.update(state["latest"])
        self.task.rng.set_state(state["rng"])
        if not self.position.finished:  # lines after a finished stage belong to the next one
            self.run.truncate_metrics(state["metrics_size"])
        return True
