"""Knowledge distillation: a trained network, the teacher, shows another one what its outputs should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.training.objective import Objective, in_float32, main_scores

Features = dict[str, Tensor]
"""Outputs of modules, by their names."""


@dataclass(frozen=True)
class Distillation:
    """The part of a loss that a teacher gives.

    With α the weight, L the loss of the task and D the distance of the outputs, the network minimises

        (1 − α) L + α D + w F.

    For scores of classes, D = T² KL(softmax(t / T) ‖ softmax(s / T)) of the teacher's scores t and the network's s at
    temperature T: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, §2; the factor T²
    keeps the size of the gradients. Under a loss of the user's own D is the mean squared error of the outputs. F is the
    mean over ``stage_ends`` of ‖f − g‖² / ‖g‖², of the network's features f and the teacher's g.

    Args:
        teacher: the teacher, in eval mode and on the device of the network; it is not changed.
        temperature: T.
        weight: α, in [0, 1].
        features: w.
        stage_ends: {module whose outputs are the features: the teacher's channels that the network has, None = all}.
    """

    teacher: nn.Module
    temperature: float = 4.0
    weight: float = 0.5
    features: float = 0.0
    stage_ends: Mapping[str, Tensor | None] = field(default_factory=dict)

    def blend(
        self, loss: Tensor, output: Any, features: Features, objective: Objective, inputs: Any, targets: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss with the teacher's part, and its terms as metrics: ``distillation``, ``features``.

        Args:
            loss: the loss of the task.
            output: the network's output.
            features: the network's features at the stage ends.
            objective: how the teacher runs on the batch.
            inputs: the batch that the network got, after mixup and the like.
            targets: the targets, as ``Objective.run`` takes them.

        Raises:
            ValueError: for outputs of another form than the teacher's.
        """
        with torch.no_grad(), watch(self.teacher, self.stage_ends) as wanted:
            answer, _ = objective.run(self.teacher, inputs, targets)
        distance = self.distance(output, answer, objective)
        metrics = {"distillation": distance.detach()}
        loss = (1 - self.weight) * loss + self.weight * distance
        if self.stage_ends:
            pairs = [(features[name], take_channels(wanted[name], kept)) for name, kept in self.stage_ends.items()]
            error = torch.stack([relative_error(own, other) for own, other in pairs]).mean()
            loss, metrics["features"] = loss + self.features * error, error.detach()
        return loss, metrics

    def distance(self, output: Any, answer: Any, objective: Objective) -> Tensor:
        """Return how far an output is from the teacher's, a scalar.

        Raises:
            ValueError: for outputs of another form than the teacher's.
        """
        if not objective.classifies:
            return squared_error(output, answer)
        return divergence(main_scores(output), main_scores(answer), self.temperature)


def divergence(scores: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return T² KL(softmax(wanted / T) ‖ softmax(scores / T)) in nats, the mean over samples and pixels.

    Args:
        scores: scores of classes [N, K] or [N, K, H, W].
        wanted: the teacher's, of the same shape.
        temperature: T.

    Raises:
        ValueError: for scores of another shape.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, §2.
    """
    require_same_shape(scores, wanted, "scores")
    own, other = (F.log_softmax(x.float() / temperature, 1) for x in (scores, wanted))
    return temperature**2 * F.kl_div(own, other, reduction="none", log_target=True).sum(1).mean()


def squared_error(output: Any, wanted: Any) -> Tensor:
    """Return the mean squared error of an output; of tuples, lists and dicts the mean over their tensors.

    Args:
        output: a tensor, or a nest of tensors; those of whole numbers do not count.
        wanted: the teacher's, of the same form.

    Raises:
        ValueError: for outputs of another form, or without a tensor of floating-point numbers.
    """
    pairs = list(pair_tensors(in_float32(output), in_float32(wanted), "output"))
    if not pairs:
        raise ValueError(
            f"teacher: an output of type {type(output).__name__} holds no tensors of floating-point numbers to "
            "compare; give forward=, which returns them"
        )
    return torch.stack([F.mse_loss(own, other).float() for own, other in pairs]).mean()


def pair_tensors(output: Any, wanted: Any, place: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the floating-point tensors of two nests side by side.

    Raises:
        ValueError: for nests of different forms; says where they differ.
    """
    if isinstance(output, Tensor) and isinstance(wanted, Tensor):
        require_same_shape(output, wanted, place)
        if output.is_floating_point():
            yield output, wanted
        return
    nests = [
        list(value) if isinstance(value, Mapping) else list(range(len(value))) if isinstance(value, (tuple, list))
        else None for value in (output, wanted)
    ]  # fmt: skip
    if isinstance(output, Tensor) or isinstance(wanted, Tensor) or nests[0] != nests[1]:
        got, need = describe(output), describe(wanted)
        raise ValueError(
            f"teacher: its {place} is {need}, that of the network in train mode is {got}; both must have one form: "
            "give forward=, which returns the same part of both, or another teacher"
        )
    for key in nests[0] or ():
        yield from pair_tensors(output[key], wanted[key], f"{place}[{key!r}]")


def describe(value: Any) -> str:
    """Return the form of an output in words."""
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def require_same_shape(own: Tensor, other: Tensor, what: str) -> None:
    """Refuse a teacher whose outputs have another shape.

    Raises:
        ValueError: with both shapes.
    """
    if own.shape != other.shape:
        raise ValueError(
            f"teacher: its {what} are of shape {list(other.shape)}, the network's of {list(own.shape)}; a teacher for "
            "the same task is needed, with as many outputs"
        )


def relative_error(features: Tensor, wanted: Tensor) -> Tensor:
    """Return ‖features − wanted‖² / ‖wanted‖², a scalar: stages with large values then weigh no more than others."""
    size = wanted.float().square().mean()
    return F.mse_loss(features.float(), wanted.float()) / size.clamp(min=torch.finfo(torch.float32).tiny)


@contextmanager
def watch(network: nn.Module, names: Iterable[str]) -> Iterator[Features]:
    """Keep the outputs of modules, by name, of the forward passes within; of several calls the last one."""
    kept: Features = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                kept.pop(name, None)  # so that names are in the order of the last calls
                kept[name] = output

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(network.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield kept


def find_stage_ends(
    network: Features, teacher: Features, kept: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor | None]:
    """Return the modules where features are compared: at each resolution the last one whose channels correspond.

    They do where the outputs have the same shape, and where a plan says which of a module's channels stay. Pooled
    features are left to the outputs, which show them.

    Args:
        network: the outputs of all modules of the network, in the order of their calls.
        teacher: those of the teacher.
        kept: {module: indices of its output channels that stay} by the plan that made the network out of the teacher.

    Returns:
        {module: the teacher's channels that the network has, None = all}.

    Raises:
        ValueError: if there is no such module.
    """
    last: dict[tuple[int, ...], tuple[str, Tensor | None]] = {}
    for name, tensor in teacher.items():
        size = tuple(tensor.shape[2:])
        if not name or name not in network or all(side == 1 for side in size):
            continue
        own, channels = network[name].shape, (kept or {}).get(name)
        if own == tensor.shape:
            last[size] = name, None
        elif channels is not None and own == (len(tensor), len(channels), *size):
            last[size] = name, channels.to(tensor.device)
    if not last:
        raise ValueError(
            "distill_features: the network has no module whose channels correspond to the teacher's; leave it out, or "
            "give as teacher the network before pruning (a network that runs as a rewritten graph has no such modules)"
        )
    return dict(last.values())


def take_channels(features: Tensor, channels: Tensor | None) -> Tensor:
    """Return some channels of features [N, C, …], all for None."""
    return features if channels is None else features[:, channels]
