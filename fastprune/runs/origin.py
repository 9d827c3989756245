"""The full network of a pruning: what builds it, and its weights; checked before a search, kept in its run."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from fastprune.engine import RunDirectory
from fastprune.graph.export.inputs import InputSpec
from fastprune.graph.model_state import state_of
from fastprune.graph.plan import PruningPlan
from fastprune.host import atomic
from fastprune.models import Source, save_weights, source_of
from fastprune.runs.record import NetworkRecord
from fastprune.surgery import RewrittenNetwork
from fastprune.surgery.slicing import slice_model


@dataclass(frozen=True)
class Origin:
    """What a full network can be built from again.

    Args:
        source: what builds it; None if only the user's code can.
        class_name: the name of its class.
        seed: the seed of its weights if they are random; None = they are kept in a file.
        weights: a ``baseline.safetensors`` of an earlier run, which holds its weights; None = the network has them.
    """

    source: Source | None = None
    class_name: str = ""
    seed: int | None = None
    weights: Path | None = None

    @staticmethod
    def find(model: nn.Module, source: Source | None = None, after: PruningPlan | None = None) -> Origin:
        """Return the origin of a network that a user gives.

        Args:
            model: the network.
            source: what the user says that builds it; None = what ``models.create`` has noted in it, if it still is
                what was built.
            after: the plan that made ``model`` out of a larger network, which is then the full one.

        Raises:
            ValueError: if ``source`` builds another network.
        """
        noted = source or source_of(model)
        name = type(model).__name__
        if noted is None:
            return Origin(None, name)
        problem = compare(noted, model, after)
        if source is not None and problem:
            raise ValueError(f"source: {source.model!r} builds another network: {problem}; give the source of this one")
        return Origin(None if problem else noted, name)

    @staticmethod
    def of_run(run: RunDirectory) -> Origin:
        """Return the origin of the full network of an earlier run, whose compact network is pruned further."""
        record = NetworkRecord.read(run)
        file = run.baseline_path if run.baseline_path.is_file() else None
        return Origin(record.source, record.class_name, record.seed if file is None else None, file)

    def keep(self, run: RunDirectory, model: nn.Module, inputs: tuple[InputSpec, ...], *, is_full: bool) -> None:
        """Write the record, and the weights unless they are random, into a run.

        Args:
            run: the run.
            model: the network that was pruned.
            inputs: shapes and dtypes of its example.
            is_full: whether ``model`` is the full network; False = it had been pruned before.
        """
        record = NetworkRecord(self.class_name, self.source, inputs)
        if self.seed is not None:
            record = replace(record, weights="seed", seed=self.seed)
        elif self.weights is not None and self.weights.is_file():
            atomic.write(run.baseline_path, lambda temporary: share(Path(str(self.weights)), temporary))
            record = replace(record, weights="file")
        elif is_full:
            save_weights(model, run.baseline_path)
            record = replace(record, weights="file")
        record.save(run)


def share(file: Path, path: Path) -> None:
    """Give a file of a run a second name; copy it where the file system cannot.

    Files of runs are replaced as a whole and never changed, so the second name keeps its content.
    """
    path.unlink()
    try:
        os.link(file, path)
    except OSError:
        shutil.copyfile(file, path)


def compare(source: Source, model: nn.Module, plan: PruningPlan | None) -> str:
    """Return in what a network differs from what its source and its plan build; "" if it is the same.

    Names and shapes of all tensors are compared, and what the modules print of themselves (strides, activations, …).

    Args:
        source: what builds the full network.
        model: the network.
        plan: the plan that made ``model`` out of the full network; None = it is the full one.
    """
    try:
        built = source.outline()
        built = built if plan is None else slice_model(plan, built)
    except Exception as error:  # a user's function raises what it likes
        return str(error)
    rewritten = isinstance(model, RewrittenNetwork)
    given, wanted = ({name: tuple(t.shape) for name, t in network.state_dict().items()} for network in (model, built))
    for name in sorted({*given, *wanted}):
        if given.get(name) != wanted.get(name):
            return f"{name} has shape {given.get(name, 'none')}, not {wanted.get(name, 'none')}"
    if not rewritten and repr(model) != repr(built):
        return "its modules differ"
    if not rewritten and set(state_of(model)) != set(state_of(built)):
        return "its buffers differ"
    return ""
