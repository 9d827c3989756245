"""Networks of a run, built again with their weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from fastprune.data import Data
from fastprune.engine import RunDirectory, RunError, choose_device
from fastprune.graph.model_state import state_of
from fastprune.graph.plan import PruningPlan
from fastprune.models import load_weights, read_weights
from fastprune.models.heads import find_head, load_body
from fastprune.runs.record import NetworkRecord
from fastprune.surgery import apply
from fastprune.surgery.slicing import copy_model

Which = Literal["pruned", "baseline"]


def load(
    run: str | Path,
    which: Which = "pruned",
    model: nn.Module | None = None,
    device: str | None = None,
    *,
    num_classes: int | None = None,
) -> nn.Module:
    """Return a network of a run with its weights.

    Args:
        run: the run's directory.
        which: "pruned", the compact network with its newest weights; or "baseline", the full network that the run's
            plan begins with. A training has one network, which both return.
        model: the full network, with any weights, for runs whose network cannot be built by name; it is not changed.
        device: "cpu", "cuda", "cuda:N" or "auto"; None = where ``model`` is, or the CPU.
        num_classes: size of a new classifier, with random weights, in place of the run's own, for a training on other
            data (transfer); None = the network as it is.

    Returns:
        The network in eval mode.

    Raises:
        RunError: if ``run`` is no finished run, if its network needs ``model``, or if it keeps no baseline.
        ValueError: for weights that do not fit the network, or a new classifier for "baseline" or ``model``.

    Example:
        >>> import tempfile, torch, fastprune as fp
        >>> network = fp.models.create("resnet20")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = fp.prune(network, torch.zeros(1, 3, 32, 32), method="l1", out=f"{folder}/run")
        ...     compact = fp.load(f"{folder}/run")
        >>> x = torch.randn(1, 3, 32, 32)
        >>> torch.equal(compact(x), result.model(x))
        True
    """
    if which not in get_args(Which):
        raise ValueError(f"which: got {which!r}; give 'pruned' or 'baseline'")
    directory = RunDirectory.open(run)
    if num_classes is not None:
        if which != "pruned" or model is not None:
            raise ValueError(
                f"num_classes {num_classes}: only the pruned network of a run that says what builds it gets a new "
                "classifier here; replace the last layer of another network yourself"
            )
        network = load_pruned(directory, classes=num_classes, new_head=True)
        return network if device is None else network.to(choose_device(device))
    network = load_pruned(directory, model) if which == "pruned" else load_baseline(directory, model)
    return network if device is None else network.to(choose_device(device))


def load_pruned(
    run: RunDirectory,
    model: nn.Module | None = None,
    *,
    data: Data | None = None,
    trained: bool = True,
    classes: int | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Return the compact network of a pruning, or the network of a training.

    Args:
        run: the run.
        model: as for ``load``.
        data: the data set, for runs of earlier versions.
        trained: whether to load the weights; False = leave those that building gave.
        classes: number of classes in place of the run's own; the classifier's weights then do not fit.
        new_head: whether the classifier keeps the values that building gave.
    """
    record = NetworkRecord.read(run, data)
    plan = PruningPlan.load(run.plan_path) if run.plan_path.is_file() else None
    if plan is None and not is_training(run):
        raise RunError(f"{str(run.path)!r} holds no plan: it is no finished pruning run")
    network = build_full(run, record, model, classes or record.classes)
    if trained:
        match_precision(network, run.model_path)
    if plan is not None:
        network = apply(plan, network, check=False)  # verified when the run was made
    if trained and new_head and classes:
        load_body(network, run.model_path, partial(find_head_of, record, classes))
    elif trained:
        load_weights(network, run.model_path)
    return network.eval()


def find_head_of(record: NetworkRecord, classes: int) -> frozenset[str]:
    """Return the names of the classifier's tensors in a network that a record builds; pruning keeps names.

    Raises:
        RunError: if nothing says what builds it.
        ValueError: if it has no classifier.
    """
    if record.source is None:
        raise RunError(f"the network, a {record.class_name}, cannot be built by a name, so its classifier is not known")
    return find_head(record.name, record.source.build, classes)


def load_baseline(run: RunDirectory, model: nn.Module | None = None, *, data: Data | None = None) -> nn.Module:
    """Return the full network that a run's plan begins with, or the network of a training.

    Args:
        run: the run.
        model: as for ``load``.
        data: the data set, for runs of earlier versions.

    Raises:
        RunError: if the run keeps no weights of it.
    """
    if not run.plan_path.is_file():
        return load_pruned(run, model, data=data)
    record = NetworkRecord.read(run, data)
    weights = run.config.get("weights")
    if run.baseline_path.is_file():
        file = run.baseline_path
    elif record.weights == "seed" and model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(record.seed or 0)
            return build_full(run, record, None).eval()
    elif not run.network_path.is_file() and weights:  # a run of an earlier version
        file = Path(str(weights))
    else:
        raise RunError(
            f"{str(run.path)!r} keeps no weights of its baseline: {reason_for_none(run, record)}; "
            "load the baseline from where it was trained"
        )
    network = build_full(run, record, model)
    match_precision(network, file)
    load_weights(network, file)
    return network.eval()


def reason_for_none(run: RunDirectory, record: NetworkRecord) -> str:
    """Return why a run has no weights of its baseline."""
    if record.weights == "seed":
        return f"they were random, drawn with seed {record.seed}, and model= would not have them"
    if is_training(run):
        return "it is a fine-tuning, and the pruning before it has them"
    if run.network_path.is_file():
        return "its network had been pruned before (after=)"
    return "an earlier version of fastprune has made it"


def is_training(run: RunDirectory) -> bool:
    """Return whether a run without a plan is a training. A pruning writes its plan before its weights."""
    return run.config.get("command") not in ("prune", "demo") and (
        run.model_path.is_file() or run.config.get("command") == "train"
    )


def build_full(
    run: RunDirectory, record: NetworkRecord, model: nn.Module | None, classes: int | None = None
) -> nn.Module:
    """Return the full network of a run, with any weights.

    Raises:
        RunError: if the run does not say what builds it, and ``model`` is not given.
    """
    if model is not None:
        return copy_model(model)
    if record.source is None:
        which = "the full network" if run.plan_path.is_file() else "the network that was trained"
        kind = "" if record.class_name == "network" else f", a {record.class_name},"
        raise RunError(
            f"{str(run.path)!r}: its network{kind} cannot be built by a name; give {which}, "
            f"with any weights: fp.load({str(run.path)!r}, model=net), or name it with --model in a command"
        )
    try:
        return record.source.build(classes)
    except RuntimeError as error:  # torch's, where sizes are absurd
        raise RunError(f"{str(run.path)!r}: {record.source.model!r} cannot be built: {error}") from error


def match_precision(model: nn.Module, file: Path) -> None:
    """Give each tensor of a network the precision that it has in a file of weights."""
    given = read_weights(file)
    for name, tensor in state_of(model).items():
        if name in given and tensor.dtype != given[name].dtype:
            tensor.data = tensor.data.to(given[name].dtype)
