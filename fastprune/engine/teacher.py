"""A teacher made ready for a training, and tried on a batch before any work is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprune.data.data import Data
from fastprune.data.nests import count_samples, take
from fastprune.data.user_data import UserData
from fastprune.engine.device import Placement
from fastprune.graph.model_state import in_eval_mode, state_of
from fastprune.graph.plan import PruningPlan
from fastprune.surgery.slicing import copy_model
from fastprune.training.distillation import Distillation, find_stage_ends, watch
from fastprune.training.objective import Objective
from fastprune.training.options import FinetuneRecipe

SAMPLES = 2  # batch norm in train mode needs more than one


def prepare_teacher(
    teacher: nn.Module,
    network: nn.Module,
    data: Data,
    recipe: FinetuneRecipe,
    *,
    device: torch.device,
    objective: Objective,
    plan: PruningPlan | None = None,
) -> Distillation:
    """Move a teacher to the device, and try it beside the network on the first samples.

    Args:
        teacher: the teacher; only its device and its memory layout change.
        network: the network that it teaches; a copy of it is run.
        data: the data set.
        recipe: temperature and weights of the distillation, precision and memory layout.
        device: where both run.
        objective: how networks run on a batch.
        plan: the plan that made the network out of the teacher, if one did; for features of pruned streams.

    Raises:
        ValueError: for a teacher that cannot take the data, has outputs of another form, or shares weights with the
            network.
    """
    own, other = ({t.data_ptr() for t in state_of(net).values() if t.numel()} for net in (network, teacher))
    if own & other:
        raise ValueError("teacher: it shares weights with the network that is trained; give a copy, copy.deepcopy(net)")
    place = Placement(device, recipe.precision, recipe.channels_last)
    place.model(teacher)
    trial = place.model(copy_model(network)).train()
    inputs, targets = first_samples(data)
    batch = place.images(inputs), place.labels(targets)
    watched = bool(recipe.distill_features)
    names = [tuple(name for name, _ in model.named_modules()) if watched else () for model in (trial, teacher)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), in_eval_mode(teacher), place.autocast():
        with watch(trial, names[0]) as features:
            output, _ = objective.run(trial, *batch)
        try:
            with watch(teacher, names[1]) as wanted:
                answer, _ = objective.run(teacher, *batch)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"teacher: a {type(teacher).__name__} cannot take a batch of the data: {error}; give a teacher for "
                "the same data"
            ) from error
        ends = find_stage_ends(features, wanted, kept_channels(plan)) if watched else {}
        distillation = Distillation(teacher, recipe.temperature, recipe.distill, recipe.distill_features, ends)
        distillation.distance(output, answer, objective)
    return distillation


def kept_channels(plan: PruningPlan | None) -> dict[str, Tensor]:
    """Return the indices of the output channels that stay, for each module whose own parameters a plan cuts."""
    pieces = () if plan is None else plan.slices
    made = [piece for piece in pieces if piece.role in ("out", "depthwise", "channel")]
    return {} if plan is None else {piece.tensor.rpartition(".")[0]: plan.kept_indices(piece) for piece in made}


def first_samples(data: Data) -> tuple[Any, Any]:
    """Return the first samples of the training set: inputs and targets, or of a user's batches all and None."""
    batch = data.first if isinstance(data, UserData) else next(iter(data.batches("train", SAMPLES)))
    return take(batch, slice(SAMPLES), count_samples(batch))
