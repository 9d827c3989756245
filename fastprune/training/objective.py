"""The objective: how a network runs on a batch, and what loss it is trained and judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Network = Callable[..., Any]

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, target)``: the mean loss of a batch, a tensor of one number."""

Forward = Callable[[Network, Any], tuple[Any, Any]]
"""``forward(model, batch)``: the output of ``model`` on a batch, as ``loss`` takes it, and the target."""

AUXILIARY_WEIGHT = 0.3  # of the losses of auxiliary heads (Szegedy et al., CVPR 2015, §5)

TOP5_CLASSES = 10
"""Fewest classes of which a top-5 accuracy is measured: of fewer, a guess among five is right more often than not."""

IGNORED = -100  # the label of pixels that torch's cross-entropy leaves out

WAY_OUT = (
    "give loss=, for example nn.MSELoss() for numbers, nn.BCEWithLogitsLoss() for several labels per image or "
    "nn.CrossEntropyLoss() for probabilities of classes"
)


@dataclass(frozen=True)
class Objective:
    """What a network is trained for, in searches, trainings and evaluations alike.

    Args:
        loss: ``loss(output, target)`` returns the mean loss of a batch; None = cross-entropy of class scores [N, K] or
            [N, K, H, W] to class labels [N] or [N, H, W]. Only then there is an accuracy.
        forward: ``forward(model, batch)`` returns ``(output, target)``. It must only call ``model``, which may be the
            network under gates; the batch is as the loader gives it, on the device. None = the last part of the batch
            is the target, the others are the network's inputs.
    """

    loss: Loss | None = None
    forward: Forward | None = None

    @property
    def classifies(self) -> bool:
        """Whether outputs are scores of classes, so that there is an accuracy."""
        return self.loss is None

    @property
    def loss_name(self) -> str:
        """The name of the loss in the log of a method that adds terms of its own."""
        return "cross_entropy" if self.classifies else "task_loss"

    @property
    def measure_name(self) -> str:
        """The name of the number that networks are judged by: accuracy, or loss if there is none."""
        return "accuracy" if self.classifies else "loss"

    def run(self, network: Network, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Run a network on a batch; return its output and the target.

        Args:
            network: a module, or a function that is called like it.
            inputs: the inputs of a batch, or the whole batch if ``targets`` is None.
            targets: the targets.

        Raises:
            ValueError: for a batch that only ``forward`` can take apart, or a ``forward`` that returns no pair.
        """
        if self.forward is None:
            inputs, targets = split(inputs, targets)
            return call(network, inputs), targets
        result = self.forward(network, inputs if targets is None else (inputs, targets))
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(f"forward: got {type(result).__name__}; it must return the pair (output, target)")
        return result[0], result[1]

    def compute(self, output: Any, target: Any, *, label_smoothing: float = 0.0, soft: bool = False) -> Tensor:
        """Return the mean loss of a batch, a scalar.

        Args:
            output: what ``run`` returns.
            target: what ``run`` returns.
            label_smoothing: as in ``classification_loss``.
            soft: whether targets may be probabilities of classes, as mixup makes them.

        Raises:
            ValueError: for targets that are no class labels and no loss for them, or a loss that is no scalar.
        """
        if self.loss is None:
            return classification_loss(output, class_labels(output, target, soft=soft), label_smoothing)[0]
        loss = self.loss(in_float32(output), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss: got {got}; a tensor of one number is needed, the mean over the batch")
        return loss.reshape(()).float()

    def measure(
        self, output: Any, target: Any, *, label_smoothing: float = 0.0, soft: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, as ``compute`` does, and the accuracies that there are, as metrics: accuracy, top5."""
        loss = self.compute(output, target, label_smoothing=label_smoothing, soft=soft)
        if not self.classifies:
            return loss, {}
        metrics = {"accuracy": self.accuracy(output, target)}
        if has_top5(output):
            labels = target.argmax(1) if target.is_floating_point() else target
            metrics["top5"] = count_top5(main_scores(output), labels) / len(labels)
        return loss, metrics

    def accuracy(self, output: Any, target: Tensor) -> Tensor:
        """Return the part of samples, or pixels, whose class has the highest score."""
        labels = target.argmax(1) if target.is_floating_point() else target
        right = (main_scores(output).argmax(1) == labels).float()
        if labels.dim() == 1:
            return right.mean()
        return right.sum() / (labels != IGNORED).sum().clamp(min=1)

    def check(self, network: Network, inputs: Any, targets: Any) -> None:
        """Try one batch, before any work is done.

        Raises:
            ValueError: for a batch that does not go through network and loss; says what to give.
        """
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                output, target = self.run(network, inputs, targets)
                if self.loss is None:
                    labels, classes = class_labels(output, target), main_scores(output).shape[1]
                    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
                    if len(wrong):
                        raise ValueError(f"the label {int(wrong[0])} is none of the network's {classes} outputs")
                self.compute(output, target)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            hint = "" if "give " in str(error) or self.forward is not None else (
                "; if the network needs its batch in another form, give forward=lambda model, batch: (output, target)"
            )  # fmt: skip
            raise ValueError(
                f"data: the first batch does not go through the network and its loss: "
                f"{type(error).__name__ + ': ' if not isinstance(error, ValueError) else ''}{error}{hint}"
            ) from error

    def require_classification(self, what: str) -> None:
        """Refuse something that only classification has.

        Raises:
            ValueError: if there is a loss of the user's own.
        """
        if not self.classifies:
            raise ValueError(f"{what}: this needs class labels and cross-entropy; leave it out with a loss of your own")


def split(inputs: Any, targets: Any) -> tuple[Any, Any]:
    """Return the inputs and the target of a batch.

    Raises:
        ValueError: for a batch that is no tuple or list of two parts or more.
    """
    if targets is not None:
        return inputs, targets
    if isinstance(inputs, (tuple, list)) and len(inputs) > 1:
        return (inputs[0], inputs[1]) if len(inputs) == 2 else (tuple(inputs[:-1]), inputs[-1])
    got = f"a dict of {', '.join(map(repr, inputs))}" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
    names = list(inputs) if isinstance(inputs, Mapping) and len(inputs) > 1 else ["image", "label"]
    raise ValueError(
        f"batch: got {got}; a pair (inputs, target) is needed; for other batches give forward=, for example "
        f"forward=lambda model, batch: (model(batch[{names[0]!r}]), batch[{names[-1]!r}])"
    )


def call(network: Network, inputs: Any) -> Any:
    """Call a network with one input, several in a tuple, or several by name in a dict."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, (tuple, list)) else network(inputs)


def in_float32(output: Any) -> Any:
    """Return outputs with numbers of 16 bits, which autocast gives, in float32; of tuples, lists and dicts each one."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, Mapping):
        return {name: in_float32(value) for name, value in output.items()}
    if type(output) in (tuple, list):
        return type(output)(map(in_float32, output))
    return output


def main_scores(output: Any) -> Tensor:
    """Return the scores of the main head, [N, K] or [N, K, H, W].

    Raises:
        ValueError: for an output that holds no scores of classes.
    """
    scores = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(scores, Tensor) or scores.dim() < 2:
        got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else f"type {type(output).__name__}"
        raise ValueError(
            f"output of {got}: class scores [N, classes] are needed; for another task {WAY_OUT}; for an output in a "
            "dict also give forward=, for example forward=lambda model, batch: (model(batch[0])['out'], batch[1])"
        )
    return scores


def has_top5(output: Any) -> bool:
    """Return whether an output is the scores of ``TOP5_CLASSES`` or more classes, one row for each sample."""
    scores = main_scores(output)
    return scores.dim() == 2 and scores.shape[1] >= TOP5_CLASSES


def count_top5(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the number of samples whose class is among the five highest scores: a scalar.

    Args:
        scores: [N, K], K at least 5.
        labels: [N], int64.
    """
    return (scores.topk(5, dim=1).indices == labels[:, None]).any(1).sum()


def class_labels(output: Any, target: Any, *, soft: bool = False) -> Tensor:
    """Return class labels as int64, or probabilities of classes if these are allowed.

    Raises:
        ValueError: for anything else; says what to give.
    """
    scores = main_scores(output)
    if not isinstance(target, Tensor):
        raise ValueError(f"target of type {type(target).__name__}: class labels [N] are needed; otherwise {WAY_OUT}")
    if target.is_floating_point():
        if soft:
            return target
        raise ValueError(
            f"target of {str(target.dtype).removeprefix('torch.')} and shape {list(target.shape)}: class labels are "
            f"whole numbers, [N]; for other targets {WAY_OUT}"
        )
    if target.dtype == torch.bool or target.is_complex() or target.shape != scores.shape[:1] + scores.shape[2:]:
        raise ValueError(
            f"target of {str(target.dtype).removeprefix('torch.')} and shape {list(target.shape)}, output of shape "
            f"{list(scores.shape)}: whole numbers of shape {[scores.shape[0], *scores.shape[2:]]} are needed, a "
            f"label for each sample of the batch (of one-hot labels give labels.argmax(1)); for another task {WAY_OUT}"
        )
    return target.long()


def classification_loss(outputs: Any, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the loss of a network's outputs, including those of auxiliary heads.

    Args:
        outputs: scores [N, classes], or a tuple of them from the main head and others, as torchvision's GoogLeNet and
            Inception return in training mode; a head may be None.
        labels: [N], or probabilities of the first K classes [N, K].
        label_smoothing: share of the target that is spread over all classes.

    Returns:
        The mean cross-entropy in nats, with a weight of 0.3 for auxiliary heads, and the main head's scores.

    Raises:
        ValueError: for probabilities of more classes than there are scores.
    """
    scores, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    if labels.is_floating_point():
        missing = scores.shape[1] - labels.shape[1]
        if missing < 0:
            raise ValueError(f"the network has {scores.shape[1]} outputs, the data have {labels.shape[1]} classes")
        labels = F.pad(labels, (0, missing))
    loss = F.cross_entropy(scores.float(), labels, label_smoothing=label_smoothing)
    for other in auxiliary:
        if other is not None:
            loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(other.float(), labels, label_smoothing=label_smoothing)
    return loss, scores
