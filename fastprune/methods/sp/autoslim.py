"""AutoSlim (Yu and Huang, 2019): train a network that works at any width, then shrink it greedily by accuracy.

The network trains as a universally slimmable one. In each step, with one update for all of them:

    the full network                                cross-entropy
    two random sub-networks and the smallest one    cross-entropy to the full network's outputs, detached

Sub-networks are the first channels of the shared weights, with the statistics of their own batch. Then, from the full
network on, each group is tried narrower, and the one that leaves the highest held-out accuracy becomes it, until the
budget is met. It is what the paper of SP compares its proxy with (Fig. 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.graph.interior import gated_units
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Task
from fastprune.methods.sp.supernet import SuperNet
from fastprune.methods.sp.weight_sharing import WeightSharing, WeightSharingConfig, backward
from fastprune.methods.sp.widths import choices_of, first_units, fitted, random_widths, units_of
from fastprune.networks.subnetworks import SubNetworks
from fastprune.options import option
from fastprune.training.phases import Metrics, Phase, Rounds

PROGRESS = 1000  # parts of the way from the full network's cost to the budget


@dataclass(frozen=True)
class AutoSlimConfig(WeightSharingConfig):
    """Options of AutoSlim; the training's are those of SP, as its paper compares the two."""

    random: int = option(2, "random sub-networks in each step, beside the full and the smallest one", minimum=0)
    stride: int = option(3, "how many of the 31 widths of a group it gives up at a time", minimum=1, maximum=30)
    groups: Literal["all", "interior"] = option("all", "which channels may go: all, or only those inside blocks")


class AutoSlim(WeightSharing):
    """Shrink a universally slimmable network by what costs the least accuracy."""

    name = "autoslim"
    paper = "Yu and Huang, AutoSlim: Towards One-Shot Architecture Search for Channel Numbers, 2019"
    Config: ClassVar[type[Any]] = AutoSlimConfig
    config: AutoSlimConfig

    def setup(self, task: Task) -> None:
        """Find the widths, make the sub-networks and the optimiser.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
            ValueError: if nothing is held out to measure accuracies on.
        """
        graph = task.graph
        gated = gated_units(graph, self.config.groups)
        self.groups = [g for g, group in enumerate(graph.groups) if bool(gated[group.units].all())]
        self.may_go = units_of(graph, self.groups)
        self.require(task)
        self.choices = choices_of(task, self.groups)
        self.places = [len(widths) - 1 for widths in self.choices]
        self.accuracy = 0.0
        self.net = SuperNet(graph, task.model, ())
        self.slices = SubNetworks(graph, task.model)
        self.frozen = self.slices.frozen()  # for comparing
        self.training = self.make_training(task, task.model)
        self.batch: tuple[Tensor, Tensor] | None = None

    def phases(self, task: Task) -> Iterator[Phase | Rounds]:
        """The training of the slimmable network, and the shrinking."""
        yield from self.train(task, "slimmable")
        yield Rounds("shrink", lambda: self.shrink(task), lambda: self.progress(task))

    # --- the slimmable network ----------------------------------------------------------------------------------------

    def learn(self, task: Task, features: Sequence[Tensor], scores: Tensor) -> Metrics:
        """Cross-entropy of random networks, and of the smallest one, to the full network's outputs."""
        target = scores.float().softmax(1)
        widths = [random_widths(self.choices, task.rng) for _ in range(self.config.random)]
        distance = torch.zeros((), device=scores.device)
        for chosen in (*widths, tuple(choices[0] for choices in self.choices)):
            narrow = self.slices(features[0], mask=first_units(task.graph, self.groups, chosen))
            apart = F.cross_entropy(narrow.float(), target)
            backward(apart)
            distance += apart.detach() / (len(widths) + 1)
        return {"narrow_loss": distance}

    # --- the shrinking ------------------------------------------------------------------------------------------------

    def mask(self, task: Task, places: Sequence[int]) -> Tensor:
        """The mask of the sub-network of these places among the choices, bool [U]."""
        widths = [choices[place] for choices, place in zip(self.choices, places, strict=True)]
        return first_units(task.graph, self.groups, widths)

    def progress(self, task: Task) -> tuple[int, int]:
        """How much of the way to the budget is gone; all of it where nothing is left to give up."""
        full, limit = float(task.budget.cost(task.graph)), task.budget.limit(task.graph)
        cost = float(task.budget.cost(task.graph, self.mask(task, self.places)))
        if cost <= limit or not any(self.places):
            return PROGRESS, PROGRESS
        return min(PROGRESS - 1, max(0, int(PROGRESS * (full - cost) / (full - limit)))), PROGRESS

    def shrink(self, task: Task) -> Metrics:
        """Make narrower the one group that this costs least."""
        assert task.data is not None
        if self.batch is None:
            self.batch = task.data.held_out_batch(self.config.images)
        trials = []
        for number, place in enumerate(self.places):
            if place > 0:
                trials.append(list(self.places))
                trials[-1][number] = max(0, place - self.config.stride)
        found = self.measure(task, [self.mask(task, places) for places in trials])
        best = max(range(len(trials)), key=lambda n: (found[n], -n))
        self.places, self.accuracy = trials[best], found[best][0]
        cost = float(task.budget.cost(task.graph, self.mask(task, self.places)))
        return {
            "sub_network_accuracy": self.accuracy,
            f"{task.budget.resource}_ratio": cost / float(task.budget.cost(task.graph)),
        }

    @torch.no_grad()
    def measure(self, task: Task, masks: Sequence[Tensor]) -> list[tuple[float, float]]:
        """Accuracy and negative cross-entropy of sub-networks, each measured by one of the ranks."""
        assert self.batch is not None
        images, labels = self.batch
        peers = task.distributed
        found = torch.zeros(len(masks), 2, dtype=torch.float64, device=images.device)
        for number in range(peers.rank, len(masks), peers.world_size):
            scores = self.frozen(images, mask=masks[number]).float()
            found[number, 0] = (scores.argmax(1) == labels).double().mean()
            found[number, 1] = -F.cross_entropy(scores.double(), labels).float()
        return [(float(accuracy), float(loss)) for accuracy, loss in peers.sum_(found).tolist()]

    def plan(self, task: Task) -> PruningPlan:
        """The widths that are left; where they miss the budget, a few more or fewer channels in their order."""
        return task.graph.plan(fitted(task, self.mask(task, self.places), self.may_go))

    def results(self) -> Metrics:
        """The accuracy of the last sub-network, with the weights that all share."""
        return {"sub_network_accuracy": self.accuracy}

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, and how far it has shrunk; the weights are saved by themselves."""
        return {"training": self.training.state_dict(), "places": list(self.places), "accuracy": self.accuracy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is of another network.
        """
        if len(state["places"]) != len(self.groups):
            raise ValueError(
                f"autoslim: the state has widths of {len(state['places'])} groups, this network has "
                f"{len(self.groups)}; was it made with another model or another option 'groups'?"
            )
        self.training.load_state_dict(state["training"])
        self.places, self.accuracy = [int(place) for place in state["places"]], float(state["accuracy"])
