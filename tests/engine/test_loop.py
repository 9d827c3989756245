"""The loop: a run killed anywhere and resumed ends with the same bits; signals and infinite losses stop it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastprune.data import load_data
from fastprune.engine import Checkpoints, Interrupted, LoopOptions, NonFiniteError, RunDirectory, run_phases
from fastprune.host.distributed import Distributed
from fastprune.training.phases import Phase, Rounds, SideSteps

DATA = load_data("synthetic:1x4x4:3:40", held_out=0)


class KilledError(Exception):
    """A power cut."""


class Walker:
    """A worker whose state depends on the batches, the task's generator, torch's generator and their order."""

    def __init__(self, kill_at: int = -1, kind: str = "raise") -> None:
        self.state = torch.zeros(16)
        self.epochs: list[int] = []
        self.calls = 0
        self.seen: list[Tensor] = []
        self.kill_at = kill_at
        self.kind = kind

    def phases(self, task: Any) -> Iterator[Phase]:
        self.task = task
        beside = SideSteps(2, self.aside, samples=10, batch_size=4)
        walk = Phase("walk", 3, self.step, samples=20, batch_size=8, augment=True, end_epoch=self.end_epoch)
        yield replace(walk, beside=beside)
        yield Phase("rest", 0, self.step)
        yield Phase("run", 2, self.step, batch_size=16)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        if self.calls == self.kill_at:
            if self.kind == "raise":
                raise KilledError
            os.kill(os.getpid(), signal.SIGTERM)
        self.calls += 1
        noise = torch.rand((), generator=self.task.rng) + torch.rand(())
        self.state = self.state * 0.9 + images.mean((0, 1)).flatten() * noise
        return {"loss": self.state.sum(), "count": len(labels)}

    def aside(self, images: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        self.seen.append(images)
        self.state = self.state - images.mean((0, 1)).flatten() * torch.rand(())
        return {"aside": self.state.mean()}

    def end_epoch(self, epoch: int) -> dict[str, float]:
        self.epochs.append(epoch)
        return {"epochs": float(len(self.epochs)), "family/member": 0.5}

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state, self.epochs = state["state"], list(state["epochs"])


def make_task() -> Any:
    return SimpleNamespace(
        model=nn.Identity(),
        device=torch.device("cpu"),
        seed=4,
        distributed=Distributed(),
        rng=torch.Generator().manual_seed(4),
    )


OPTIONS = LoopOptions(log_every=2, checkpoint_steps=3, checkpoint_epochs=2)
STEPS = 3 * 3 + 2 * 3  # epochs × batches of both phases


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Walker, RunDirectory, dict[str, float]]:
    run = RunDirectory.create(tmp_path_factory.mktemp("whole") / "run", {})
    worker = Walker()
    return worker, run, run_phases(worker, make_task(), DATA, run=run, options=OPTIONS)


def test_every_step_once(whole: tuple[Walker, RunDirectory, dict[str, float]]) -> None:
    worker, run, metrics = whole
    assert worker.calls == STEPS
    assert worker.epochs == [0, 1, 2]
    assert metrics["epochs"] == 3
    steps = [record["step"] for record in run.metrics()]
    assert steps == sorted(steps)
    assert steps[-1] == STEPS
    assert {record["phase"] for record in run.metrics()} == {"walk", "run"}


def test_families_of_metrics_are_in_the_log_only(whole: tuple[Walker, RunDirectory, dict[str, float]]) -> None:
    _, run, metrics = whole
    assert [r["epoch"] for r in run.metrics() if r.get("family/member") == 0.5] == [0, 1, 2]
    assert metrics.keys() == {"loss", "count", "epochs", "aside"}
    state = Checkpoints(run.checkpoints_path("search")).load_latest()
    assert state is not None
    assert state["latest"] == metrics


@pytest.mark.parametrize("kind", ["raise", "signal"])
@pytest.mark.parametrize("kill_at", range(0, STEPS, 2))
def test_kill_and_resume_is_exact(
    tmp_path: Path, kill_at: int, kind: str, whole: tuple[Walker, RunDirectory, dict[str, float]]
) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    with pytest.raises(KilledError if kind == "raise" else Interrupted):
        run_phases(Walker(kill_at, kind), make_task(), DATA, run=run, options=OPTIONS)
    torch.manual_seed(kill_at)
    worker, task = Walker(), make_task()
    task.rng.manual_seed(99)
    metrics = run_phases(worker, task, DATA, run=RunDirectory.open(run.path), resume=True, options=OPTIONS)
    assert torch.equal(worker.state, whole[0].state)
    assert worker.epochs == whole[0].epochs
    assert run.metrics_path.read_bytes() == whole[1].metrics_path.read_bytes()
    assert metrics == whole[2]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    first, again = Walker(), Walker()
    run_phases(first, make_task(), DATA, run=run)
    run.log({"stage": "training", "step": 0})
    run_phases(again, make_task(), DATA, run=run, resume=True)
    assert again.calls == 0
    assert torch.equal(first.state, again.state)
    assert run.metrics()[-1]["stage"] == "training"


def test_starting_anew_forgets_old_checkpoints(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    run_phases(Walker(), make_task(), DATA, run=run)
    with pytest.raises(KilledError):
        run_phases(Walker(5), make_task(), DATA, run=run)
    worker = Walker()
    run_phases(worker, make_task(), DATA, run=run, resume=True)
    assert worker.calls > 0


def test_interruption_says_how_to_resume(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"search was interrupted at step 5; resume it from .*run"):
        run_phases(Walker(4, "signal"), make_task(), DATA, run=run)
    assert signal.getsignal(signal.SIGTERM) is before


class Bad(Walker):
    def step(self, images: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        metrics = super().step(images, labels)
        return {"loss": float("nan") if self.calls > 4 else metrics["loss"]}


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    with pytest.raises(NonFiniteError, match=r"phase 'walk', epoch 1, at step 6: loss is nan; lower the learning rate"):
        run_phases(Bad(), make_task(), DATA, run=run, options=OPTIONS)
    assert all(record["loss"] is not None for record in run.metrics() if "loss" in record)
    worker = Walker()
    run_phases(worker, make_task(), DATA, run=run, resume=True)
    assert worker.state.isfinite().all()
    assert worker.calls == STEPS - 3


def test_phases_need_data() -> None:
    with pytest.raises(ValueError, match="'walk' reads training data"):
        run_phases(Walker(), make_task(), None)


def test_side_steps_read_their_own_samples(whole: tuple[Walker, RunDirectory, dict[str, float]]) -> None:
    """9 steps with a side step after every 2nd: 4 side steps, over batches of 4, 4 and 2 of the same 10 samples."""
    seen = whole[0].seen
    assert [len(images) for images in seen] == [4, 4, 2, 4]
    first = {bytes(image.numpy()) for images in seen[:3] for image in images}
    assert len(first) == 10
    assert {bytes(image.numpy()) for image in seen[3]} < first
    drawn = DATA.batches("train", 40, seed=4, samples=10)
    assert first == {bytes(image.numpy()) for images, _ in drawn for image in images}


def test_side_steps_need_steps_between_them() -> None:
    with pytest.raises(ValueError, match="every 0"):
        SideSteps(0, Walker().aside)


class Idle(Walker):
    def phases(self, task: Any) -> Iterator[Phase]:
        return iter(())


def test_a_worker_without_phases_needs_no_data(tmp_path: Path) -> None:
    assert run_phases(Idle(), make_task(), None, run=RunDirectory.create(tmp_path / "run", {})) == {}


class Searcher(Walker):
    """A worker with rounds between two phases; their number grows during the run."""

    def __init__(self, kill_at: int = -1, kind: str = "raise") -> None:
        super().__init__(kill_at, kind)
        self.rounds = 0

    def phases(self, task: Any) -> Iterator[Phase | Rounds]:  # type: ignore[override]
        self.task = task
        yield Phase("walk", 1, self.step, samples=20, batch_size=8)
        yield Rounds("search", self.round, lambda: (self.rounds, 3 if self.rounds < 2 else 5))
        yield Phase("run", 1, self.step, batch_size=16)

    def round(self) -> dict[str, float]:
        self.step(torch.rand(2, 1, 4, 4), torch.zeros(2))  # torch's generator is seeded before each
        self.rounds += 1
        return {"least": float(self.state.min()), "family/member": 1.0}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.rounds = int(state["rounds"])


def test_rounds_go_on_until_all_is_done_and_are_logged(tmp_path: Path) -> None:
    run, worker = RunDirectory.create(tmp_path / "run", {}), Searcher()
    metrics = run_phases(worker, make_task(), DATA, run=run, options=OPTIONS)
    assert (worker.rounds, worker.calls) == (5, 3 + 5 + 3)
    logged = [record for record in run.metrics() if record["phase"] == "search"]
    assert [record["step"] for record in logged] == [4, 5, 6, 7, 8]
    assert all(record["family/member"] == 1 for record in logged)
    assert metrics["least"] == logged[-1]["least"]
    assert "family/member" not in metrics


@pytest.mark.parametrize("kind", ["raise", "signal"])
@pytest.mark.parametrize("kill_at", [1, 3, 4, 6, 7, 9])
def test_rounds_are_resumed_exactly(tmp_path: Path, kill_at: int, kind: str) -> None:
    whole = Searcher()
    expected = run_phases(whole, make_task(), DATA, options=OPTIONS)
    run = RunDirectory.create(tmp_path / "run", {})
    with pytest.raises(KilledError if kind == "raise" else Interrupted):
        run_phases(Searcher(kill_at, kind), make_task(), DATA, run=run, options=OPTIONS)
    resumed = Searcher()
    assert run_phases(resumed, make_task(), DATA, run=run, resume=True, options=OPTIONS) == expected
    assert torch.equal(resumed.state, whole.state)
    assert resumed.rounds == 5
    assert resumed.calls < whole.calls or kill_at == 1
