"""Fine-tuning and evaluation of a network after pruning, with the user's own data and loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune import engine
from fastprune.arguments import check_arguments, check_kind, make_objective
from fastprune.data import Data, Split, UserData
from fastprune.data.given import GivenData, as_data
from fastprune.data.user_data import Loader
from fastprune.engine import Evaluation, LoopOptions, Placement, RunDirectory, choose_device, prepare_teacher, train
from fastprune.engine.run import plain, run_directory
from fastprune.graph.export.inputs import Inputs, InputSpec
from fastprune.graph.model_state import device_of, in_eval_mode
from fastprune.host.distributed import Distributed
from fastprune.options import build, fields_of
from fastprune.pruning import PruningResult
from fastprune.runs import NetworkRecord, Origin, load
from fastprune.training.example import example_of
from fastprune.training.objective import Forward, Loss, Objective
from fastprune.training.options import FinetuneRecipe


def finetune(
    model: nn.Module | PruningResult,
    data: GivenData,
    *,
    held_out: Loader | float | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    teacher: nn.Module | PruningResult | str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    loop: LoopOptions | None = None,
    **options: Any,
) -> dict[str, float]:
    """Train a network in place, as ``fastprune finetune`` does, and leave it in eval mode.

    Args:
        model: the network, or the result of ``prune``, whose ``model`` is trained.
        data: training data, as for ``prune``.
        held_out: held-out samples, as for ``prune``; measured after each epoch.
        loss: the loss, as for ``prune``.
        forward: how the model runs on a batch, as for ``prune``.
        teacher: a trained network whose outputs the model learns beside the targets, mostly the one before pruning; it
            is moved to the device. A path is a run, whose network it is; None = no teacher.
        out: directory for log, checkpoints and the weights, which ``fastprune.load`` reads; None = nothing is written.
        resume: whether to continue the training in ``out`` from its last checkpoint.
        seed: seed of order, augmentation and dropout.
        device: "cpu", "cuda", "cuda:N" or "auto"; None = where the model is.
        loop: how often log and checkpoints are written.
        **options: fields of ``FinetuneRecipe``: ``epochs``, ``lr``, ``optimizer``, ``weight_decay``, …; ``ema`` for a
            moving average of the weights; ``temperature``, ``distill`` and ``distill_features`` beside a teacher, see
            ``fastprune.training.distillation.Distillation``.

    Returns:
        The last value of every metric: loss, lr, held_out_loss; for classification also accuracy, held_out_accuracy;
        with a teacher also distillation, features.

    Raises:
        ValueError: for an unknown option, or data that are not understood; says what to give.
        TypeError: for an argument of a wrong type.
        Interrupted, NonFiniteError: see ``fastprune.engine.train``.

    Example:
        >>> import torch, fastprune as fp
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 1))
        >>> loader = [(torch.randn(8, 1, 8, 8), torch.randn(8, 1))]
        >>> metrics = fp.finetune(network, loader, loss=torch.nn.MSELoss(), epochs=2)
        >>> sorted(metrics)
        ['loss', 'lr']
    """
    network = model.model if isinstance(model, PruningResult) else model
    check_arguments(model=network, out=out, resume=resume, seed=seed, device=device)
    check_kind("loop", loop, LoopOptions)
    if resume and out is None:
        raise ValueError("resume: give out=, the directory of the run to continue")
    objective, recipe = make_objective(loss, forward), build(FinetuneRecipe, options, owner="finetune")
    tutor = find_teacher(teacher, options)
    source = as_data(data, held_out, seed=seed)
    if source is None:
        raise ValueError("data: None; training data are needed, a DataLoader say")
    where = device_of(network) if device is None else choose_device(str(device))
    if isinstance(source, UserData):
        place = Placement(where, recipe.precision, recipe.channels_last)
        inputs, targets = source.first
        with in_eval_mode(network), place.autocast():
            objective.check(place.model(network), place.images(inputs), place.labels(targets))
    distillation = None if tutor is None else prepare_teacher(
        tutor, network, source, recipe, device=where, objective=objective,
        plan=model.plan if isinstance(model, PruningResult) else None,
    )  # fmt: skip
    peers = Distributed.from_environment()
    settings = {
        "command": "finetune",
        "seed": seed,
        "teacher": teacher_name(teacher),
        **plain({f.name: getattr(recipe, f.name) for f in fields_of(FinetuneRecipe)}),
    }
    with run_directory(out, settings, peers, resume=resume) as run:
        metrics = train(
            network, source, recipe, run=run, seed=seed, device=where, distributed=peers, resume=resume, options=loop,
            stage="finetune", objective=objective, distillation=distillation, ema=recipe.ema,
        )  # fmt: skip
        if run is not None and peers.is_main:
            keep_network(run, model, source, objective)
    return metrics


def find_teacher(teacher: object, options: Mapping[str, Any]) -> nn.Module | None:
    """Return the network that is named as teacher; None if there is none.

    Raises:
        ValueError: for a name of the command line, or options that need a teacher.
        TypeError: for something else than a network or the path of a run.
    """
    if teacher is None or teacher == "none":
        idle = [name for name in ("temperature", "distill", "distill_features") if name in options]
        if idle:
            raise ValueError(f"{idle[0]}: there is no teacher; give teacher=, the network before pruning say")
        return None
    if teacher == "auto":
        raise ValueError(
            "teacher 'auto': a result in memory does not keep the full network; give it itself, teacher=model, or "
            "teacher=fp.load(RUN, which='baseline')"
        )
    if isinstance(teacher, (str, Path)):
        return load(teacher)
    network = teacher.model if isinstance(teacher, PruningResult) else teacher
    if not isinstance(network, nn.Module):
        raise TypeError(f"teacher: got {type(teacher).__name__}; a torch.nn.Module or the path of a run is needed")
    return network


def teacher_name(teacher: object) -> str:
    """Return what the settings of a run say of its teacher: the path as it was given, or the class of a network."""
    if teacher is None or isinstance(teacher, (str, Path)):
        return str(teacher or "none")
    return type(teacher.model if isinstance(teacher, PruningResult) else teacher).__name__


def keep_network(run: RunDirectory, model: nn.Module | PruningResult, data: Data, objective: Objective) -> None:
    """Write what ``fastprune.load`` needs into the run of a fine-tuning: the plan too, if it is known."""
    if isinstance(model, PruningResult):
        model.plan.save(run.plan_path)
        model.origin.keep(run, model.model, model.plan.inputs, is_full=False)
        return
    inputs: tuple[InputSpec, ...] = (InputSpec((2, *data.shape), "float32"),)
    if isinstance(data, UserData):
        try:
            inputs = Inputs.from_example(example_of(objective, model, data.first), model).specs
        except (TypeError, ValueError):  # what is no tensor, as a switch; export then asks for an example
            inputs = ()
    origin = Origin.find(model)
    NetworkRecord(origin.class_name, origin.source, inputs).save(run)


def evaluate(
    model: nn.Module | PruningResult,
    data: GivenData,
    *,
    loss: Loss | None = None,
    forward: Forward | None = None,
    device: str | torch.device | None = None,
) -> Evaluation:
    """Measure a network on each sample of a loader, or of the test set of a data set.

    Args:
        model: the network, or the result of ``prune``, whose ``model`` is measured.
        data: a loader; or a data set, as for ``prune``, whose test set is measured.
        loss: the loss, as for ``prune``.
        forward: how the model runs on a batch, as for ``prune``.
        device: "cpu", "cuda", "cuda:N" or "auto"; None = where the model is.

    Returns:
        The mean loss, the number of samples, and for classification the accuracy; of 10 classes or more also ``top5``.

    Raises:
        ValueError: for data that are not understood; says what to give.
        TypeError: for an argument of a wrong type.
    """
    network = model.model if isinstance(model, PruningResult) else model
    check_arguments(model=network, device=device)
    objective = make_objective(loss, forward)
    source = as_data(data)
    if source is None:
        raise ValueError("data: None; a loader or a data set is needed")
    split: Split = "train" if isinstance(source, UserData) and not source.size("test") else "test"
    place = Placement(device_of(network) if device is None else choose_device(str(device)))
    return engine.evaluate(
        place.model(network), source, split, placement=place, distributed=Distributed.from_environment(),
        objective=objective,
    )  # fmt: skip
