"""The full network of a run as it was right before the cut, with which a compensation begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.data import Data
from fastprune.engine import RunDirectory, RunError
from fastprune.engine.checkpoint import Checkpoints
from fastprune.graph.model_state import state_of
from fastprune.graph.plan import PruningPlan
from fastprune.methods import registry
from fastprune.runs.loading import build_full, load_baseline, load_pruned, match_precision
from fastprune.runs.record import NetworkRecord
from fastprune.surgery import apply


def load_uncut(run: RunDirectory, model: nn.Module | None = None, *, data: Data | None = None) -> nn.Module:
    """Return the full network of a pruning with the weights that it was cut from.

    A method that trains weights leaves them in the last checkpoint of its search; for the others they are the
    baseline's. They are taken only if cutting them gives the weights of the run, bit for bit; of a run that was
    compensated, if it gives the scales of its batch norms, which no compensation changes.

    Args:
        run: the run.
        model: as for ``load``.
        data: the data set, for runs of earlier versions.

    Raises:
        RunError: if the run has been fine-tuned, or its full weights are not at hand; says which, and what to do.
    """
    plan = PruningPlan.load(run.plan_path) if run.plan_path.is_file() else None
    if plan is None or not run.model_path.is_file():
        raise RunError(f"{str(run.path)!r} holds no plan with weights: it is no finished pruning run")
    name = str(run.path)
    if NetworkRecord.read(run, data).classes is not None:
        raise RunError(f"{name!r} was trained for other classes after the cut; {WAYS_OUT}")
    compact = load_pruned(run, model, data=data)
    uncut = load_candidate(run, model, data)
    names = None if not is_compensated(run.config) else scale_names(compact)
    evident = names != [] or not (run.config.get("from_run") or is_fine_tuned(run.metrics()))
    if evident and same_weights(apply(plan, uncut, check=False), compact, names):
        return uncut
    raise RunError(f"{name!r}: {reason_for_difference(run)}; {WAYS_OUT}")


def expand_pruned(run: RunDirectory, model: nn.Module | None = None, *, data: Data | None = None) -> nn.Module:
    """Return a full network that, cut by the run's plan, is its compact network; any weights are where channels go.

    Args:
        run: the run.
        model: as for ``load``.
        data: the data set, for runs of earlier versions.
    """
    record, plan = NetworkRecord.read(run, data), PruningPlan.load(run.plan_path)
    compact = state_of(load_pruned(run, model, data=data))
    full = build_full(run, record, model, record.classes)
    match_precision(full, run.model_path)
    for name, tensor in state_of(full).items():
        places = [torch.arange(size) for size in tensor.shape]
        for piece in plan.slices:
            if piece.tensor == name:
                places[piece.dim] = plan.kept_indices(piece)
        if name in compact:
            index = torch.meshgrid(*places, indexing="ij") if places else ()
            tensor.data[index] = compact[name].detach().to(tensor.device)
    return full.eval()


WAYS_OUT = "calibrate with how='bn' (--how bn), or prune again with compensate= (--compensate)"


def load_candidate(run: RunDirectory, model: nn.Module | None, data: Data | None) -> nn.Module:
    """Return the full network with the weights that the search ended with, as far as the run keeps them."""
    trained = read_trained(run)
    if trained is not None:
        uncut = build_full(run, NetworkRecord.read(run, data), model)
        if run.baseline_path.is_file():
            match_precision(uncut, run.baseline_path)
        uncut.load_state_dict(trained)
        return uncut.eval()
    if trains_weights(run.config):
        raise RunError(
            f"{str(run.path)!r}: method {run.config['method']!r} trains the weights, and checkpoints/search, which had "
            f"them before the cut, is not in this directory; {first_run(run)}{WAYS_OUT}"
        )
    try:
        return load_baseline(run, model, data=data)
    except RunError as error:
        raise RunError(f"{error}; {WAYS_OUT}") from error


def first_run(run: RunDirectory) -> str:
    """Return the way out to the run that a calibrated one was made from."""
    section = run.config.get("calibrate")
    return f"calibrate {str(section.get('run'))!r}, " if isinstance(section, Mapping) else ""


def read_trained(run: RunDirectory) -> dict[str, Tensor] | None:
    """Return the weights at the end of a search that trained them; None if there are none."""
    state = Checkpoints(run.checkpoints_path("search"), run.distributed).load_latest()
    if state is None or not state["position"]["finished"]:
        return None
    weights: dict[str, Tensor] | None = state["model"]
    return weights


def trains_weights(config: Mapping[str, Any]) -> bool:
    """Return whether the method of a run trains weights; False if it is not installed."""
    try:
        return registry.load(str(config.get("method"))).trains_weights
    except ValueError:
        return False


def is_compensated(config: Mapping[str, Any]) -> bool:
    """Return whether the weights of a run may have been compensated."""
    return config.get("compensate", "none") != "none" or "calibrate" in config


def is_fine_tuned(records: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the log of a run has lines of a fine-tuning."""
    return any(is_of_fine_tuning(record) for record in records)


def is_of_fine_tuning(record: Mapping[str, Any]) -> bool:
    """Return whether a line of a log belongs to a fine-tuning."""
    return "finetune" in (record.get("stage"), record.get("method"))


def reason_for_difference(run: RunDirectory) -> str:
    """Return why the weights of a run are not those of its full network, cut."""
    if run.config.get("command") == "finetune" or is_fine_tuned(run.metrics()):
        return "it has been fine-tuned since the cut, and the full network has not"
    if run.config.get("from_run"):
        return (
            f"its network came from {run.config['from_run']!r}, which had been trained or compensated since its own cut"
        )
    return f"method {run.config.get('method')!r} changes weights at the cut, and the run does not keep what they were"


def scale_names(model: nn.Module) -> list[str]:
    """Return the names of the trained tensors of batch norms, which a training changes and a compensation does not."""
    names = list(model.state_dict())
    norms = {name.rpartition(".")[0] for name in names if name.endswith("running_mean")}
    return [name for name in names if name.rpartition(".")[0] in norms and name.endswith((".weight", ".bias"))]


def same_weights(one: nn.Module, other: nn.Module, names: Sequence[str] | None = None) -> bool:
    """Return whether two networks have equal tensors: all of them, or those of ``names``."""
    first, second = one.state_dict(), other.state_dict()
    wanted = first.keys() | second.keys() if names is None else names
    return all(name in first and name in second and torch.equal(first[name], second[name]) for name in wanted)
