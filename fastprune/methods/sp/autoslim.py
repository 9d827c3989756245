"""AutoSlim (Yu and Huang, 2019): train a network that works at any width, then shrink it greedily by accuracy.

The network trains as a universally slimmable one. In each step, with one update for all of them:

    the full network                                cross-entropy
    two random sub-networks and the smallest one    cross-entropy to the full network's outputs, detached

Sub-networks are the first channels of the shared weights, with the statistics of their own batch. Then the full network
shrinks step by step: each group is tried narrower, and the one with the highest held-out accuracy becomes narrower,
until the budget is met. SP's paper compares its proxy with this method (Fig. 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.graph.interior import GROUPS, gated_units
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Task
from fastprune.methods.sp.supernet import SuperNet
from fastprune.methods.sp.weight_sharing import WeightSharing, WeightSharingConfig, backward
from fastprune.methods.sp.widths import (
    first_units,
    fit_widths,
    group_units,
    random_widths,
    smallest_widths,
    width_choices,
)
from fastprune.networks.subnetworks import SubNetworks
from fastprune.options import option
from fastprune.training.phases import Metrics, Phase, Rounds

PROGRESS = 1000  # steps of the progress bar from the full network's cost to the budget


@dataclass(frozen=True)
class AutoSlimConfig(WeightSharingConfig):
    """Options of AutoSlim; those of the training are SP's, as its paper compares the two."""

    random: int = option(2, "random sub-networks per step, besides the full and the smallest one", minimum=0)
    stride: int = option(3, "how many of its 31 widths a group shrinks by at a time", minimum=1, maximum=30)
    groups: Literal["all", "interior", "auto"] = option("all", GROUPS)


class AutoSlim(WeightSharing):
    """Shrink a universally slimmable network step by step where that costs the least accuracy."""

    name = "autoslim"
    paper = "Yu and Huang, AutoSlim: Towards One-Shot Architecture Search for Channel Numbers, 2019"
    Config: ClassVar[type[Any]] = AutoSlimConfig
    config: AutoSlimConfig

    def setup(self, task: Task) -> None:
        """Find the widths; create the sub-networks and the optimiser.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
            ValueError: if nothing is held out to measure accuracies on, or outputs are no scores of classes.
        """
        task.objective.require_classification("autoslim")
        graph = task.graph
        gated = gated_units(graph, self.config.groups)
        self.groups = [g for g, group in enumerate(graph.groups) if bool(gated[group.units].all())]
        self.prunable_units = group_units(graph, self.groups)
        self.check_task(task)
        self.choices = width_choices(task, self.groups)
        self.places = [len(widths) - 1 for widths in self.choices]
        self.accuracy = 0.0
        self.net = SuperNet(graph, task.model, ())
        self.slices = SubNetworks(graph, task.model)
        self.frozen = self.slices.freeze()  # for the shrinking
        self.training = self.make_training(task, task.model)
        self.batch: tuple[Tensor, Tensor] | None = None

    def phases(self, task: Task) -> Iterator[Phase | Rounds]:
        """Yield the training of the slimmable network, then the shrinking."""
        yield from self.train(task, "slimmable")
        yield Rounds("shrink", lambda: self.shrink(task), lambda: self.progress(task))

    # --- the slimmable network ----------------------------------------------------------------------------------------

    def learn(self, task: Task, features: Sequence[Tensor], scores: Any) -> Metrics:
        """Learn with random networks and the smallest one from the cross-entropy to the full network's outputs."""
        target = scores.float().softmax(1)
        random = [random_widths(self.choices, task.rng) for _ in range(self.config.random)]
        mean = torch.zeros((), device=scores.device)
        for widths in (*random, smallest_widths(self.choices)):
            narrow = self.slices(features[0], mask=first_units(task.graph, self.groups, widths))
            loss = F.cross_entropy(narrow.float(), target)
            backward(loss)
            mean += loss.detach() / (len(random) + 1)
        return {"narrow_loss": mean}

    # --- the shrinking ------------------------------------------------------------------------------------------------

    def mask(self, task: Task, places: Sequence[int]) -> Tensor:
        """Return the mask of the sub-network with these places among the choices, bool [U]."""
        widths = [choices[place] for choices, place in zip(self.choices, places, strict=True)]
        return first_units(task.graph, self.groups, widths)

    def progress(self, task: Task) -> tuple[int, int]:
        """Return how much of the way to the budget is done; all of it if no group can shrink further."""
        full, limit = float(task.budget.cost(task.graph)), task.budget.limit(task.graph)
        cost = float(task.budget.cost(task.graph, self.mask(task, self.places)))
        if cost <= limit or not any(self.places):
            return PROGRESS, PROGRESS
        return min(PROGRESS - 1, max(0, int(PROGRESS * (full - cost) / (full - limit)))), PROGRESS

    def shrink(self, task: Task) -> Metrics:
        """Make the group narrower whose shrinking costs the least accuracy."""
        assert task.data is not None
        if self.batch is None:
            self.batch = task.data.held_out_batch(self.config.images)
        trials = []
        for number, place in enumerate(self.places):
            if place > 0:
                trials.append(list(self.places))
                trials[-1][number] = max(0, place - self.config.stride)
        measured = self.measure(task, [self.mask(task, places) for places in trials])
        best = max(range(len(trials)), key=lambda n: (measured[n], -n))
        self.places, self.accuracy = trials[best], measured[best][0]
        cost = float(task.budget.cost(task.graph, self.mask(task, self.places)))
        return {
            "sub_network_accuracy": self.accuracy,
            f"{task.budget.resource}_ratio": cost / float(task.budget.cost(task.graph)),
        }

    @torch.no_grad()
    def measure(self, task: Task, masks: Sequence[Tensor]) -> list[tuple[float, float]]:
        """Measure accuracy and negative cross-entropy of sub-networks, each on one of the ranks."""
        assert self.batch is not None
        images, labels = self.batch
        peers = task.distributed
        results = torch.zeros(len(masks), 2, dtype=torch.float64, device=images.device)
        for number in range(peers.rank, len(masks), peers.world_size):
            scores = self.frozen(images, mask=masks[number]).float()
            results[number, 0] = (scores.argmax(1) == labels).double().mean()
            results[number, 1] = -F.cross_entropy(scores.double(), labels).float()
        return [(float(accuracy), float(loss)) for accuracy, loss in peers.sum_(results).tolist()]

    def plan(self, task: Task) -> PruningPlan:
        """Keep the remaining widths; if they miss the budget, add or remove some channels in their order."""
        return task.graph.plan(fit_widths(task, self.mask(task, self.places), self.prunable_units))

    def results(self) -> Metrics:
        """Report the accuracy of the last sub-network with the shared weights."""
        return {"sub_network_accuracy": self.accuracy}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state, and the current widths with their accuracy; the engine saves the weights."""
        return {"training": self.training.state_dict(), "places": list(self.places), "accuracy": self.accuracy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is for another network.
        """
        if len(state["places"]) != len(self.groups):
            raise ValueError(
                f"autoslim: the state has widths of {len(state['places'])} groups, this network has "
                f"{len(self.groups)}; resume with the model and the option 'groups' of the first run"
            )
        self.training.load_state_dict(state["training"])
        self.places, self.accuracy = [int(place) for place in state["places"]], float(state["accuracy"])
