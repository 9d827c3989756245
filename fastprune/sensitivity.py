"""How much accuracy, or loss, each group costs: one group at a time is narrowed, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from fastprune.data import Data
from fastprune.engine import Placement, choose_device, evaluate
from fastprune.graph import ChannelGraph, Group, trace
from fastprune.graph.export.inputs import Example, Inputs
from fastprune.graph.model_state import device_of
from fastprune.host import atomic, progress
from fastprune.methods.scores.filters import unit_norms
from fastprune.methods.scores.ranking import ranks
from fastprune.networks.masked import MaskedNetwork
from fastprune.surgery.slicing import copy_model
from fastprune.training.objective import Forward, Loss, Objective

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Point:
    """A measurement with one group narrowed.

    Args:
        group: the group's name.
        ratio: the part of its units that stays, as it was asked for.
        kept: the number of units that stay.
        size: the number of its units.
        accuracy: top-1 on the held-out samples, in [0, 1]; None with a loss of the user's own.
        loss: mean loss on them.
    """

    group: str
    ratio: float
    kept: int
    size: int
    accuracy: float | None
    loss: float

    @property
    def value(self) -> float:
        """The accuracy, or the loss if there is none."""
        return self.loss if self.accuracy is None else self.accuracy


@dataclass(frozen=True)
class Sensitivity:
    """The measurements of ``sensitivity``.

    Args:
        accuracy: top-1 of the full network on the held-out samples; None with a loss of the user's own.
        loss: its mean loss.
        samples: number of held-out samples.
        points: the measurements, group by group, ratios rising.
    """

    accuracy: float | None
    loss: float
    samples: int
    points: tuple[Point, ...]

    @property
    def measure(self) -> str:
        """The name of what is compared: "accuracy", or "loss" if there is none."""
        return "loss" if self.accuracy is None else "accuracy"

    @property
    def value(self) -> float:
        """The accuracy of the full network, or its loss."""
        return self.loss if self.accuracy is None else self.accuracy

    def lost(self, point: Point) -> float:
        """Return the accuracy that a measurement lost, or the part by which its loss is greater."""
        if self.accuracy is None:
            return (point.loss - self.loss) / max(abs(self.loss), 1e-12)
        return self.accuracy - point.value

    def of_group(self, name: str) -> list[Point]:
        """Return the measurements of a group, ratios rising."""
        return [point for point in self.points if point.group == name]

    def suggest(self, drop: float = 0.01) -> dict[str, float]:
        """Return for each group the smallest ratio from which on accuracy stays within ``drop`` of the full network's.

        Args:
            drop: the accuracy that a group may cost, as a fraction: 0.01 is one point; or the part by which the loss
                may rise. The groups add up: all of them together cost more, until the network is fine-tuned.
        """
        found = {}
        for name in dict.fromkeys(point.group for point in self.points):
            least = 1.0
            for point in reversed(self.of_group(name)):
                if self.lost(point) > drop:
                    break
                least = point.ratio
            found[name] = least
        return found

    def keep_ratio(self, drop: float = 0.01) -> tuple[str, ...]:
        """Return the suggestion as values of ``--keep_ratio`` and of ``Limits.parse``: ``layer1.0.conv1=0.25:1``."""
        return tuple(f"{name}={least:g}:1" for name, least in self.suggest(drop).items())

    def save(self, path: str | Path, drop: float = 0.01) -> None:
        """Write the suggestion as a YAML file that ``fastprune prune --config`` reads."""
        head = f"# Parts that cost at most {drop:g} of {self.value:g} held-out {self.measure}, one group at a time.\n"
        atomic.write_text(Path(path), head + yaml.safe_dump({"keep_ratio": list(self.keep_ratio(drop))}))


def sensitivity(
    model: nn.Module,
    example_inputs: Example,
    data: Data,
    *,
    ratios: Sequence[float] = RATIOS,
    device: str | None = None,
    ignore: Sequence[str] = (),
    batch_size: int = 256,
    loss: Loss | None = None,
    forward: Forward | None = None,
) -> Sensitivity:
    """Measure held-out accuracy and loss over the part of each group that stays, one group at a time.

    Within a group the channels with the largest filters stay (by their ℓ₁ norm). Nothing is trained: channels are
    masked.

    Args:
        model: the trained network; it is not changed.
        example_inputs: a batch of inputs, as for ``prune``.
        data: the data set; its held-out part is what is measured on.
        ratios: parts that stay, each above 0 and below 1.
        device: as for ``prune``.
        ignore: layers whose channels stay; see ``trace``.
        batch_size: samples per step.
        loss: as for ``prune``; with a loss of your own the loss is compared in place of the accuracy.
        forward: as for ``prune``.

    Raises:
        ValueError: for ratios out of range, data without a held-out part, or a network without prunable channels.

    Example:
        >>> import torch, fastprune as fp
        >>> data = fp.data.load_data("synthetic:3x8x8:4:64")
        >>> model = fp.models.create("resnet20", num_classes=4)
        >>> found = fp.sensitivity(model, torch.zeros(1, 3, 8, 8), data, ratios=[0.5])
        >>> found.points[0].group, found.points[0].kept, found.points[0].size
        ('conv1', 8, 16)
    """
    wrong = [ratio for ratio in ratios if not 0 < ratio < 1]
    if wrong or not ratios:
        raise ValueError(f"ratios {list(ratios)}: numbers above 0 and below 1 are needed")
    if not data.size("held_out"):
        raise ValueError(f"data {data.name!r} holds nothing out to measure on: give held_out (--held_out 0.1)")
    place = Placement(device_of(model) if device is None else choose_device(device))
    network, data = place.model(copy_model(model)).eval(), data.to(place.device)
    inputs = Inputs.from_example(example_inputs, network).map(lambda x: x.to(place.device))
    with progress.begin("tracing the network"):
        graph = trace(network, inputs, ignore=ignore)
    if not graph.groups:
        raise ValueError("no channels of this network can be pruned: 'fastprune inspect' says why")
    masked, order, objective = MaskedNetwork(graph, network), unit_norms(graph, network, p=1), Objective(loss, forward)

    def measure(mask: Tensor) -> tuple[float | None, float]:
        gated = masked.under(mask.float().to(place.device))
        result = evaluate(gated, data, "held_out", batch_size=batch_size, placement=place, objective=objective)
        return result.get("accuracy"), result["loss"]

    accuracy, full_loss = measure(torch.ones(graph.num_units))
    points = []
    with progress.begin("measuring groups", len(graph.groups) * len(ratios)) as work, progress.muted():
        for group, ratio, mask in narrowings(graph, order, sorted(ratios)):
            points.append(Point(group.name, ratio, int(mask[group.units].sum()), group.size, *measure(mask)))
            work.advance(metrics={objective.measure_name: points[-1].value})
    return Sensitivity(accuracy, full_loss, data.size("held_out"), tuple(points))


def narrowings(graph: ChannelGraph, scores: Tensor, ratios: Sequence[float]) -> list[tuple[Group, float, Tensor]]:
    """Return (group, ratio, mask [U]) for each group and ratio: the best units of one group, and all of the others."""
    found = []
    for group in graph.groups:
        place = ranks(scores[group.units])
        for ratio in ratios:
            mask = torch.ones(graph.num_units, dtype=torch.bool)
            mask[group.units] = place < max(1, round(ratio * group.size))
            found.append((group, ratio, mask))
    return found
