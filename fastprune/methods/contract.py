"""The contract between a pruning method and the rest of fastprune.

A method declares *what* happens to one batch. The engine owns the loop around it (device, precision, processes,
progress, logging, checkpoints, resume).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fastprune.graph import ChannelGraph
from fastprune.graph.plan import PruningPlan
from fastprune.host.distributed import Distributed
from fastprune.networks.masked import MaskedNetwork
from fastprune.planning.budget import Budget
from fastprune.planning.fitting import fit
from fastprune.planning.limits import Limits
from fastprune.training.objective import Network, Objective
from fastprune.training.phases import Metrics, Phase, Rounds


class TaskData(Protocol):
    """The data that a method may use: the training set and a part held out of it, never the test set."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def samples(self) -> int:
        """Number of training samples, without the held-out ones."""

    @property
    def held_out(self) -> int:
        """Number of held-out samples; where it is 0, ``accuracy`` and ``loss`` raise ``ValueError``."""

    def steps(self, batch_size: int, samples: int | None = None) -> int:
        """Count the steps of one epoch over all training samples, or over ``samples`` of them."""

    def held_out_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first held-out images [n, C, H, W], at most ``count``, with labels [n]; the same on every rank.

        Raises:
            ValueError: if nothing is held out.
        """

    def accuracy(self, network: Network) -> float:
        """Measure the top-1 accuracy in [0, 1] of ``network`` on the held-out samples, over all ranks.

        Raises:
            ValueError: if the task's objective has no accuracy.
        """

    def loss(self, network: Network) -> float:
        """Measure the mean loss of ``network`` on the held-out samples, over all ranks."""


@dataclass
class Task:
    """The input of a method.

    Args:
        model: the network to prune, on ``device``, in eval mode.
        graph: the channel groups of ``model``.
        budget: the largest cost of the plan.
        limits: bounds on the plan's widths; ``fitting.fit`` keeps to them.
        device: the device of all tensors.
        seed: the seed of the run; the same on every rank.
        distributed: this process among its peers.
        data: held-out measurements and facts of the data set; None where the user gave no data.
        rng: a CPU generator with the same state on every rank; the engine saves and restores it.
        objective: how networks run on a batch, and their loss.
    """

    model: nn.Module
    graph: ChannelGraph
    budget: Budget
    limits: Limits = field(default_factory=Limits)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    distributed: Distributed = field(default_factory=Distributed)
    data: TaskData | None = None
    rng: torch.Generator = field(default_factory=torch.Generator)
    objective: Objective = field(default_factory=Objective)

    @cached_property
    def masked(self) -> MaskedNetwork:
        """The network with a gate in front of every reader of a prunable channel; built on first use."""
        return MaskedNetwork(self.graph, self.model)

    def measure(self, network: Network) -> float:
        """Measure the held-out accuracy, or the loss if the objective has none: ``objective.measure_name`` says which.

        Args:
            network: the model, or a function that is called like it, such as ``masked.under(gates)``.

        Raises:
            ValueError: if nothing is held out.
        """
        assert self.data is not None
        return self.data.accuracy(network) if self.objective.classifies else self.data.loss(network)

    def require_feasible(self, prunable: Tensor) -> None:
        """Refuse a budget that is out of reach, before a search that could not meet it.

        Args:
            prunable: the units that may be removed, bool [U].

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
        """
        fit(self.graph, self.budget, torch.zeros(self.graph.num_units), prunable=prunable, limits=self.limits)


class Method(ABC):
    """A pruning method. Subclass it, give it a ``Config``, register it in the entry-point group ``fastprune.methods``.

    The order of calls is ``__init__``, ``setup``, ``load_state_dict`` (only when a run is resumed), then the phases in
    order, then ``plan``. ``state_dict`` holds all state that the steps change: a run that is killed anywhere and
    resumed must end with the same plan, bit for bit.

    Class attributes:
        name: the name that users type; equals the entry point's name.
        paper: the publication; "" for a folklore baseline.
        needs_data: whether the phases read training data.
        trains_weights: whether the phases change the model's parameters or buffers.
        Config: a dataclass; each field has a default and a description in ``metadata["help"]``. Its fields become
            the command line's flags and the keys of ``config.yaml``.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False
    trains_weights: ClassVar[bool] = False
    Config: ClassVar[type[Any]]

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def setup(self, task: Task) -> None:  # noqa: B027 - optional hook
        """Create the state (parameters, optimiser) for ``task``; called once, before the other methods."""

    def phases(self, task: Task) -> Iterator[Phase | Rounds]:
        """Return the phases in order, the same on every rank and on every call; none for a method without a search."""
        return iter(())

    @abstractmethod
    def plan(self, task: Task) -> PruningPlan:
        """Return the channels to keep, within ``task.budget`` and ``task.limits``, after all phases.

        Called again with another budget where a latency is corrected.
        """

    def results(self) -> Metrics:
        """Return metrics of the finished search to report with the plan; called after ``plan``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return all state: nested dicts and lists of tensors, numbers, strings, booleans and None."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if state:
            raise ValueError(f"method {self.name!r}: got a state with keys {sorted(state)}; this method keeps no state")


def is_evaluation_due(epoch: int, epochs: int, every: int) -> bool:
    """Return whether a held-out accuracy is due after an epoch: every few epochs and after the last one.

    Args:
        epoch: the epoch, counted from 0.
        epochs: the number of epochs.
        every: epochs between two accuracies; 0 = never.
    """
    return every > 0 and ((epoch + 1) % every == 0 or epoch + 1 == epochs)
