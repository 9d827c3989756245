"""The loop: phases × epochs × steps, for the search of every method and for training alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from fastprune.data.batches import torch_seed
from fastprune.data.data import Data
from fastprune.data.sources import Batch
from fastprune.engine.checkpoint import Checkpoints
from fastprune.engine.device import Placement
from fastprune.engine.interruption import Interruption
from fastprune.engine.loggers import Records
from fastprune.engine.meter import Meter, NonFiniteError
from fastprune.engine.phase_batches import PhaseBatches
from fastprune.engine.run import RunDirectory
from fastprune.host import progress
from fastprune.host.distributed import Distributed
from fastprune.host.errors import Interrupted
from fastprune.options import check, option
from fastprune.training.phases import Metrics, Phase, Rounds, Step


class LoopTask(Protocol):
    """The part of a task that the loop needs; ``fastprune.methods.contract.Task`` has it."""

    model: nn.Module
    device: torch.device
    seed: int
    distributed: Distributed
    rng: torch.Generator


T = TypeVar("T", bound=LoopTask)
T_contra = TypeVar("T_contra", bound=LoopTask, contravariant=True)


class Worker(Protocol[T_contra]):
    """The owner of the phases: a ``Method``, or the ``Trainer``. Without ``trains_weights``, False is meant."""

    def phases(self, task: T_contra) -> Iterator[Phase | Rounds]:
        """The phases, in order; the same on every call."""

    def state_dict(self) -> dict[str, Any]:
        """All state except the model's."""

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
    progress: bool = option(True, "show progress on standard error: a bar on a terminal, a line per epoch elsewhere")

    def __post_init__(self) -> None:
        check(self)


@dataclass
class Position:
    """The progress of a run: ``step`` counts within the epoch, ``total`` from the start."""

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
    records: Records | None = None,
    weights: int | None = None,
) -> dict[str, float]:
    """Run all phases of ``worker``; a run that is stopped anywhere and resumed ends with the same bits.

    Before each step torch's default generators are seeded from (seed, step), so that dropout needs no saved state.

    Args:
        worker: gives the phases; all its state is in ``state_dict`` (and in the model's, with ``trains_weights``).
        task: handed to ``worker.phases``; its ``rng`` is saved and restored.
        data: source of the batches; may be None for a worker without phases.
        run: directory for the log and the checkpoints; None = nothing is written.
        stage: name of the checkpoints' folder, and of the stage in the log.
        resume: whether to continue from the newest checkpoint of ``stage`` in ``run``, if there is one.
        placement: device, precision and layout; None = the task's device in float32.
        options: how often to write.
        records: what gets every line of the log, besides ``run``; on rank 0 only.
        weights: a checksum of the weights that the run begins with; checkpoints keep it. None = they are not compared.

    Returns:
        The last value of every metric, without families (names with a slash, see ``Phase``).

    Raises:
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
        NonFiniteError: if a loss is infinite or not a number; no checkpoint has it.
        ValueError: if the worker has phases but ``data`` is None, or the run was begun with other weights.
    """
    placement, options = placement or Placement(task.device), options or LoopOptions()
    loop = Loop(worker, task, data, run, stage, placement, options, records or Records(), weights)
    if not (resume and loop.resume()):
        loop.start()
    loop.run()
    return loop.latest


class Loop(Generic[T]):
    """One run of a worker's phases: its position, its metrics, its log and its checkpoints.

    The arguments are those of ``run_phases``.
    """

    def __init__(
        self,
        worker: Worker[T],
        task: T,
        data: Data | None,
        directory: RunDirectory | None,
        stage: str,
        placement: Placement,
        options: LoopOptions,
        records: Records,
        weights: int | None = None,
    ) -> None:
        self.worker, self.task, self.data = worker, task, data
        self.directory, self.stage = directory, stage
        self.placement, self.options, self.records = placement, options, records
        self.peers = task.distributed
        self.position, self.meter = Position(), Meter(placement.device)
        self.latest: dict[str, float] = {}
        self.trains_weights = bool(getattr(worker, "trains_weights", False))
        self.checkpoints = Checkpoints(directory.checkpoints_path(stage), self.peers) if directory else None
        self.saved_at = time.monotonic()
        self.interruption = Interruption()
        self.weights = weights
        self.quiet = not (options.progress and self.peers.is_main)

    def start(self) -> None:
        """Start anew. The checkpoint of step 0 records which lines of the log came before this stage."""
        if self.checkpoints is not None:
            self.checkpoints.clear()
        self.save()

    def resume(self) -> bool:
        """Load the newest checkpoint; return False if there is none."""
        state = self.checkpoints.load_latest() if self.checkpoints else None
        if state is None or self.directory is None:
            return False
        begun_with = state.get("weights")  # checkpoints of earlier versions have none
        differs = begun_with is not None and self.weights is not None and begun_with != self.weights
        if int(self.peers.broadcast_(torch.tensor([int(differs)]))):  # rank 0 decides for all
            raise ValueError(
                f"resume: {str(self.directory.path)!r} was begun with other weights of the network; "
                "give the same network, or another directory"
            )
        self.weights = begun_with
        self.load_state_dict(state)
        if not self.position.finished:  # lines after a finished stage belong to the next one
            self.directory.truncate_metrics(state["metrics_size"])
        return True

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        self.saved_at = time.monotonic()
        if self.checkpoints is not None and self.directory is not None and self.peers.is_main:
            state = {**self.state_dict(), "metrics_size": self.directory.metrics_size()}
            self.checkpoints.save(self.position.total, state)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "worker": self.worker.state_dict(),
            "model": self.task.model.state_dict() if self.trains_weights else None,
            "position": asdict(self.position),
            "meter": self.meter.state_dict(),
            "latest": self.latest,
            "rng": self.task.rng.get_state(),
            "weights": self.weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.worker.load_state_dict(state["worker"])
        if self.trains_weights:
            self.task.model.load_state_dict(state["model"])
        self.position = Position(**state["position"])
        self.meter.load_state_dict(state["meter"])
        self.latest.update(state["latest"])
        self.task.rng.set_state(state["rng"])

    def run(self) -> None:
        """Run the phases that are left."""
        with self.interruption, progress.muted(self.quiet):
            for number, phase in enumerate(self.worker.phases(self.task)):
                if number >= self.position.phase and not self.position.finished:
                    phase.run(self)
            if not self.position.finished:
                self.position.finished = True
                self.save()

    def run_epochs(self, phase: Phase) -> None:
        """Take one step per batch, over the epochs that are left of a phase."""
        if self.data is None:
            raise ValueError(f"phase {phase.name!r} reads training data, but no data were given")
        batches = PhaseBatches(self.data, self.position.phase, self.task.seed, self.peers)
        steps = batches.steps(phase)
        side = phase.beside and batches.side(phase.beside, self.position.epoch * steps + self.position.step)
        begun = self.position.epoch * steps + self.position.step
        with progress.begin(phase.name, phase.epochs * steps, epochs=phase.epochs, done=begun) as bar:
            while self.position.epoch < phase.epochs:
                for batch in batches.read(phase, self.position.epoch, self.position.step):
                    self.advance(phase, batch)
                    done = self.position.epoch * steps + self.position.step
                    if phase.beside and side and done % phase.beside.every == 0:
                        self.compute(phase.beside.step, next(side))
                    bar.advance(metrics=self.latest)
                    self.write_after_step(phase)
                self.end_epoch(phase, bar)
        self.end_phase()

    def run_rounds(self, phase: Rounds) -> None:
        """Call ``round`` until all is done."""
        done, total = phase.progress()
        with progress.begin(phase.name, total, done=done) as bar:
            while done < total:
                self.seed_step()
                with self.placement.autocast():
                    metrics = floats(phase.round())
                self.position.total += 1
                self.record(phase, metrics)
                done, total = phase.progress()
                bar.update(done, total, self.latest)
                self.save_if_due(is_multiple(self.position.total, self.options.checkpoint_steps))
                self.stop_if_asked()
        self.end_phase()
        self.save()

    def advance(self, phase: Phase, batch: Batch) -> None:
        """Take one step of a phase."""
        self.seed_step()
        self.compute(phase.step, batch)
        self.position.step += 1
        self.position.total += 1

    def compute(self, step: Step, batch: Batch) -> None:
        """Call ``step`` on one batch and add its metrics to the meter."""
        images, labels = batch
        with self.placement.autocast():
            self.meter.add(step(self.placement.images(images), self.placement.labels(labels)))

    def seed_step(self) -> None:
        """Seed torch's default generators for the next step."""
        torch.manual_seed(torch_seed(self.task.seed, self.position.total))

    def write_after_step(self, phase: Phase) -> None:
        """Write a line of the log or a checkpoint, or stop, where the step is due for it."""
        total, options = self.position.total, self.options
        log_now = is_multiple(total, options.log_every)
        save_now = is_multiple(total, options.checkpoint_steps)
        # Several ranks stop only where all of them look, at the lines of the log; a single one stops at once.
        stop_now = log_now or (self.peers.world_size == 1 and self.interruption.requested)
        if not (log_now or save_now or stop_now):
            return
        means = self.reduce(phase)
        if log_now:
            self.record(phase, means)
            self.meter.reset()
        self.save_if_due(save_now)
        if stop_now:
            self.stop_if_asked()

    def end_epoch(self, phase: Phase, bar: progress.Work) -> None:
        """Log an epoch, show it and move to the next one."""
        metrics = self.reduce(phase)
        if phase.end_epoch is not None:
            metrics |= floats(phase.end_epoch(self.position.epoch))
        self.record(phase, metrics)
        bar.end_epoch(self.position.epoch, self.latest)
        self.meter.reset()
        self.position.epoch += 1
        self.position.step = 0
        self.save_if_due(is_multiple(self.position.epoch, self.options.checkpoint_epochs))
        self.stop_if_asked()

    def end_phase(self) -> None:
        """Move to the next phase."""
        self.position.phase += 1
        self.position.epoch = 0

    def reduce(self, phase: Phase) -> dict[str, float]:
        """Return the metrics since the last line of the log, as means over steps and ranks."""
        try:
            return self.meter.reduce(self.peers)
        except NonFiniteError as error:
            position = self.position
            raise NonFiniteError(
                f"{self.stage} stopped in phase {phase.name!r}, epoch {position.epoch}, at step {position.total}: "
                f"{error}; lower the learning rate, or look for wrong values in the data"
            ) from error

    def record(self, phase: Phase | Rounds, metrics: Mapping[str, float]) -> None:
        """Write a line of the log."""
        self.latest.update({name: value for name, value in metrics.items() if "/" not in name})
        if metrics:
            place = {"stage": self.stage, "phase": phase.name, "epoch": self.position.epoch}
            line = {**place, "step": self.position.total, **metrics}
            if self.directory is not None:
                self.directory.log(line)
            if self.peers.is_main:
                self.records(line)

    def save_if_due(self, due: bool) -> None:
        """Write a checkpoint if it is ``due`` or the last one is too old."""
        if due or time.monotonic() - self.saved_at > self.options.checkpoint_seconds:
            self.save()

    def stop_if_asked(self) -> None:
        """Save and stop if any rank received a signal."""
        if self.interruption.requested_anywhere(self.peers):
            self.save()
            hint = f"; resume it from {self.directory.path}" if self.directory else ""
            raise Interrupted(f"{self.stage} was interrupted at step {self.position.total}{hint}")


def is_multiple(count: int, interval: int) -> bool:
    """Return whether ``count`` is a multiple of ``interval``; never for the interval 0."""
    return interval > 0 and count % interval == 0


def floats(metrics: Metrics) -> dict[str, float]:
    """Return metrics as Python numbers."""
    return {name: float(value) for name, value in metrics.items()}
