"""Compensation of a run that exists: from its full weights and its plan to a new run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.arguments import check_arguments, make_objective
from fastprune.data import Data
from fastprune.data.given import GivenData, as_data, note_data
from fastprune.engine import Placement, RunDirectory, RunError, choose_device
from fastprune.engine.run import run_directory
from fastprune.graph import ChannelGraph
from fastprune.graph.model_state import device_of
from fastprune.graph.plan import PruningPlan
from fastprune.host import atomic, progress
from fastprune.host.distributed import Distributed
from fastprune.job import Tracing
from fastprune.models import save_weights
from fastprune.recovery import (
    CALIBRATION_IMAGES,
    How,
    Recovery,
    calibration_inputs,
    compensate_weights,
    has_batch_norms,
    plan_in,
)
from fastprune.result import PruningResult
from fastprune.runs import Origin, expand_pruned, is_training, load_uncut
from fastprune.runs.origin import share
from fastprune.runs.uncut import is_of_fine_tuning
from fastprune.surgery import cut
from fastprune.surgery.surgery import Cut
from fastprune.training.objective import Forward, Objective

FINETUNE_CONFIG = "finetune.yaml"


def calibrate(
    run: str | Path,
    data: GivenData,
    how: How = "sequential",
    *,
    images: int = CALIBRATION_IMAGES,
    out: str | Path | None = None,
    model: nn.Module | None = None,
    forward: Forward | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    memory: float | None = None,
) -> PruningResult:
    """Compensate the weights of a pruning run that exists, as ``prune(compensate=…)`` would have done.

    The weights before the cut are needed: those of the run's baseline, or of the last checkpoint of a search that
    trained them. ``bn`` alone works without them, on any compact network, a fine-tuned one too.

    Args:
        run: the run's directory; it is not changed.
        data: training data, as for ``prune``.
        how: the kind of compensation: "sequential", "one_pass", "mean" or "bn".
        images: number of samples that are taken.
        out: directory of the new run, on which ``load`` and every command work; None = nothing is written.
        model: the full network, with any weights, for runs whose network cannot be built by name.
        forward: how the model runs on a batch, as for ``prune``.
        seed: seed of the choice of samples; None = the run's.
        device: "cpu", "cuda", "cuda:N" or "auto"; None = where ``model`` is, or the CPU.
        memory: GiB for values between layers, see ``compensate``.

    Returns:
        The compensated compact model, verified against the masked one, with the run's plan.

    Raises:
        ValueError: for an unknown kind, missing data, or "bn" for a network without batch norms.
        TypeError: for an argument of a wrong type.
        RunError: if ``run`` is no finished pruning, or its weights before the cut are not at hand; says what to do.
        PlanError, SurgeryError: see ``apply``.

    Example:
        >>> import tempfile, torch, fastprune as fp
        >>> network, loader = fp.models.create("resnet20"), [(torch.randn(16, 3, 32, 32), torch.zeros(16).long())]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     raw = fp.prune(network, torch.zeros(1, 3, 32, 32), method="l1", out=f"{folder}/l1")
        ...     result = fp.calibrate(f"{folder}/l1", loader, "bn", images=16)
        >>> result.plan.macs == raw.plan.macs
        True
    """
    begun = time.monotonic()
    Recovery(how, images)  # refuses what is out of range
    if how == "none":
        raise ValueError("how: got 'none'; choose sequential, one_pass, mean or bn")
    check_arguments(out=out, device=device, **({} if model is None else {"model": model}))
    peers, objective = Distributed.from_environment(), make_objective(None, forward)
    directory = RunDirectory.open(run, peers)
    chosen = directory.config.get("seed", 0) if seed is None else seed
    check_arguments(seed=chosen)
    source = as_data(data, seed=chosen)
    if source is None:
        raise ValueError("data: None; training data are needed, a DataLoader say")
    where = choose_device(str(device)) if device is not None else device_of(model) if model is not None else "cpu"
    subject = Subject.read(directory, how, model, source, torch.device(where))
    inputs = subject.inputs(source, images, chosen, objective, peers)
    section = {
        "run": str(directory.path.absolute()),
        "how": how,
        "images": images,
        "seed": chosen,
        "data": source.name if isinstance(data, Data) else note_data(data).get("data"),
    }
    settings = {**directory.config, "calibrate": subject.describe(section)}
    with run_directory(out, settings, peers, resume=False) as new:
        compact, found = subject.compensate(inputs, how, peers, memory)
        metrics = {
            **last_plan(directory, subject.plan),
            "difference": compact.difference,
            "seconds": time.monotonic() - begun,
            "compensation": {"how": how, **found},
        }
        if new is not None and peers.is_main:
            subject.keep(new, compact.model, metrics)
        peers.barrier()
    return PruningResult(
        compact.model.eval(),
        subject.plan,
        metrics,
        subject.graph,
        str(settings.get("method", "")),
        str(settings.get("budget", "")),
        settings,
        Origin.of_run(directory),
    )


@dataclass(frozen=True)
class Subject:
    """What a run gives to a compensation.

    Args:
        run: the run.
        plan: its plan.
        graph: the channel graph of the full network.
        full: the full network as it was cut; of a run with later weights, one that is its compact network, cut.
        is_later: whether the compact network has later weights; ``full`` then has any weights where channels go.
    """

    run: RunDirectory
    plan: PruningPlan
    graph: ChannelGraph
    full: nn.Module
    is_later: bool

    @staticmethod
    def read(run: RunDirectory, how: How, model: nn.Module | None, data: Data, device: torch.device) -> Subject:
        """Read a run; refuse one that cannot be compensated in this way."""
        if not run.plan_path.is_file():
            what = "a training" if is_training(run) else "no finished pruning run"
            raise RunError(f"{str(run.path)!r} holds no plan: it is {what}; calibrate a pruning run")
        plan = PruningPlan.load(run.plan_path)
        try:
            full, is_later = load_uncut(run, model, data=data), False
        except RunError:
            if how != "bn" or not run.model_path.is_file():
                raise
            full, is_later = expand_pruned(run, model, data=data), True
        full.to(device)
        if how == "bn" and not has_batch_norms(full):
            raise ValueError(f"bn: the network of {str(run.path)!r} has no batch norm with running statistics")
        if is_later and not plan.exact:
            raise ValueError(
                f"bn: the plan of {str(run.path)!r} is inexact, and the weights before the cut are not at hand: norms "
                "would mix unknown channels; prune again with compensate= (--compensate)"
            )
        tracing = Tracing(
            rewrite=not run.config.get("keep_class", False),
            exact=plan.exact,
            replace_norms=bool(plan.norms),
            heads=run.config.get("heads", False),
        )
        with progress.begin("tracing the network", wanted=run.distributed.is_main):
            graph = tracing.trace(full, plan.example(full), device)
        return Subject(run, plan, graph, full, is_later)

    def inputs(
        self, data: Data, images: int, seed: int, objective: Objective, peers: Distributed
    ) -> list[list[Tensor]]:
        """Return what the network gets for some training samples, batch by batch."""
        place = Placement(device_of(self.full))
        return calibration_inputs(
            self.graph, self.full, data.to(place.device), images, seed=seed, placement=place,
            objective=objective, peers=peers,
        )  # fmt: skip

    def describe(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Return what ``config.yaml`` says of the compensation; ``before`` is an earlier one that it builds on."""
        described = dict(section)
        if self.is_later:
            described["after_finetuning"] = (self.run.path / FINETUNE_CONFIG).is_file()
            if "calibrate" in self.run.config:
                described["before"] = self.run.config["calibrate"]
        return described

    def compensate(
        self, inputs: list[list[Tensor]], how: How, peers: Distributed, memory: float | None
    ) -> tuple[Cut, dict[str, Any]]:
        """Return the compact network with new weights, verified, and what was done."""
        plan = plan_in(self.graph, self.plan)
        changed, work = compensate_weights(
            self.graph, self.full, plan, inputs, how, peers=peers, show=peers.is_main, memory=memory
        )
        with progress.begin("cutting and verifying", wanted=peers.is_main):
            return cut(self.plan, changed), asdict(work)

    def keep(self, new: RunDirectory, compact: nn.Module, metrics: Mapping[str, Any]) -> None:
        """Write a run that needs no file of the old one, but its checkpoints: these stay where they are."""
        old, tuned = self.run, self.is_later
        for path, copy in ((old.network_path, new.network_path), (old.plan_path, new.plan_path)):
            if path.is_file():
                shutil.copyfile(path, copy)
        if old.baseline_path.is_file():
            atomic.write(new.baseline_path, lambda temporary: share(old.baseline_path, temporary))
        if tuned and (old.path / FINETUNE_CONFIG).is_file():
            shutil.copyfile(old.path / FINETUNE_CONFIG, new.path / FINETUNE_CONFIG)
        save_weights(compact, new.model_path)
        for record in old.metrics():
            if tuned or not is_of_fine_tuning(record):  # one that was not finished has not changed the weights
                new.log(record)
        new.log({"stage": "plan", **metrics})


def last_plan(run: RunDirectory, plan: PruningPlan) -> dict[str, Any]:
    """Return what the log of a run says of its plan; its costs at least."""
    lines = [record for record in run.metrics() if record.get("stage") == "plan"]
    known = {name: value for name, value in (lines[-1] if lines else {}).items() if name != "stage"}
    costs = {
        "macs": {"full": plan.macs[0], "planned": plan.macs[1]},
        "params": {"full": plan.params[0], "planned": plan.params[1]},
    }
    return {**costs, **known}
