"""What is shipped: a network, and what is known of how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune.engine import RunDirectory
from fastprune.graph.export.inputs import Example, Inputs, InputSpec
from fastprune.graph.plan import PruningPlan
from fastprune.host.errors import UserError
from fastprune.models import Source, source_of
from fastprune.pruning import PruningResult
from fastprune.report.log import read_finetuning
from fastprune.runs import NetworkRecord, load_pruned
from fastprune.runs.origin import compare
from fastprune.surgery.slicing import copy_model


class ExportError(UserError):
    """A network that cannot be exported, or a file that computes something else."""


@dataclass(frozen=True)
class Subject:
    """A network to ship.

    Args:
        model: a copy of the network, in eval mode, on the CPU.
        inputs: shapes and dtypes of its inputs.
        plan: the plan that made it; None if it is not known.
        source: what builds the full network; None if only the user's code can.
        class_name: the name of the full network's class.
        settings: the settings of the pruning.
        finetuning: the settings of a fine-tuning; empty without one.
        results: the networks' measurements, {"baseline", "compact", "fine-tuned": {"accuracy": …}}, as far as known.
        classes: number of classes of the compact network, if it differs from the source's.
    """

    model: nn.Module
    inputs: tuple[InputSpec, ...]
    plan: PruningPlan | None = None
    source: Source | None = None
    class_name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    finetuning: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    classes: int | None = None

    @property
    def name(self) -> str:
        """The name of the network for people: its class, unless everybody can build it by a name."""
        return self.source.model if self.source is not None and self.source.is_known else self.class_name

    def record(self) -> NetworkRecord:
        """Return what rebuilding needs."""
        return NetworkRecord(self.class_name, self.source, self.inputs, classes=self.classes)

    def examples(self, batch: int) -> Inputs:
        """Return random inputs of a batch size; the same in every call."""
        generator = torch.Generator().manual_seed(0)
        specs = [InputSpec((batch, *spec.shape[1:]), spec.dtype, spec.name) for spec in self.inputs]
        samples = [(spec.name, spec.sample(generator)) for spec in specs]
        return Inputs(tuple(x for name, x in samples if name is None), {name: x for name, x in samples if name})

    def narrowed(self) -> dict[str, int]:
        """Return the layers that pruning has narrowed, with their numbers of output channels."""
        if self.plan is None:
            return {}
        tensors = dict(self.model.named_parameters())
        widths = {}
        for piece in self.plan.slices:
            weight = tensors.get(piece.tensor)
            if weight is not None and weight.dim() >= 2 and piece.role in ("out", "depthwise"):
                kept = len(self.plan.kept_indices(piece))
                if kept < len(piece.units):
                    widths[piece.tensor.rpartition(".")[0] or piece.tensor] = kept
        return widths

    def metadata(self) -> dict[str, str]:
        """Return what is known of the network as texts, for the header of a file of weights."""
        facts: dict[str, Any] = {"network": self.record().to_json()}
        if self.plan is not None:
            facts |= {"plan": self.plan.to_json()}
        if self.settings:
            facts |= {"settings": dict(self.settings), "results": self.results}
        texts = {name: json.dumps(value, separators=(",", ":"), default=str) for name, value in facts.items()}
        return {"format": "pt", "fastprune": version("fastprune"), **texts}


def read_subject(
    what: nn.Module | PruningResult | str | Path, example: Example | None = None, model: nn.Module | None = None
) -> Subject:
    """Return what is to be shipped.

    Args:
        what: a network, a result of ``prune``, or the directory of a run.
        example: a batch of inputs; needed for a network, otherwise that of the run.
        model: the full network of a run that cannot be built by a name; see ``fastprune.load``.

    Raises:
        ExportError: for a network without an example.
        TypeError: for anything else.
    """
    if isinstance(what, PruningResult):
        subject = subject_of_result(what)
    elif isinstance(what, nn.Module):
        if example is None:
            raise ExportError("example: got none; a network is exported with a batch of its inputs, give example=")
        inputs = Inputs.from_example(example, what).specs
        subject = Subject(what, inputs, None, source_if_same(source_of(what), None, what), type(what).__name__)
    elif isinstance(what, (str, Path)):
        subject = subject_of_run(RunDirectory.open(what), model)
    else:
        raise TypeError(f"got a {type(what).__name__}; give a network, a result of prune, or a run's directory")
    own = copy_model(subject.model).cpu().eval()
    inputs = subject.inputs if example is None else Inputs.from_example(example, own).specs
    if not inputs:
        raise ExportError("example: the run does not say what its network takes; give example=")
    return Subject(**{**vars(subject), "model": own, "inputs": inputs})


def subject_of_result(result: PruningResult) -> Subject:
    """Return what a result of ``prune`` ships."""
    return Subject(
        result.model,
        result.plan.inputs,
        result.plan,
        source_if_same(result.origin.source, result.plan, result.model),
        result.origin.class_name or type(result.model).__name__,
        result.settings,
    )


def source_if_same(source: Source | None, plan: PruningPlan | None, model: nn.Module) -> Source | None:
    """Return a source if it still builds a network, None if the network has been changed."""
    return None if source is None or compare(source, model, plan) else source


def subject_of_run(run: RunDirectory, model: nn.Module | None) -> Subject:
    """Return what a run ships."""
    record = NetworkRecord.read(run)
    plan = PruningPlan.load(run.plan_path) if run.plan_path.is_file() else None
    return Subject(
        load_pruned(run, model),
        record.inputs or (plan.inputs if plan is not None else ()),
        plan,
        record.source,
        record.class_name,
        run.config,
        dict(read_finetuning(run.path / "finetune.yaml")),
        read_results(run),
        record.classes,
    )


def read_results(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Return the newest measurements of each network in a run's log."""
    found: dict[str, dict[str, Any]] = {}
    for record in run.metrics():
        if record.get("stage") != "result":
            continue
        tuned = record.get("method") == "finetune"
        for name in ("baseline", "compact"):
            if isinstance(record.get(name), Mapping):
                found["fine-tuned" if tuned else name] = dict(record[name])
    return found
