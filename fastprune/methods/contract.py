"""The contract between a pruning method and everything else.

A method declares *what* happens to one batch; the engine owns the loop around it (device, precision, processes,
progress, logging, checkpoints, resume).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
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
from fastprune.planning.limits import Limits
from fastprune.training.phases import Metrics, Phase, Rounds


class TaskData(Protocol):
    """What a method may know of the data: the training set and a part held out of it. Never the test set."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def samples(self) -> int:
        """Number of training samples, those held out not among them."""

    @property
    def held_out(self) -> int:
        """Number of held-out samples; without any, ``accuracy`` and ``loss`` raise ``ValueError``."""

    def steps(self, batch_size: int, samples: int | None = None) -> int:
        """Steps of one epoch over all training samples, or over ``samples`` of them."""

    def held_out_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """The first held-out images [n, C, H, W], at most ``count``, and their labels [n]; the same on every rank.

        Raises:
            ValueError: where nothing is held out.
        """

    def accuracy(self, network: Callable[[Tensor], Tensor]) -> float:
        """Top-1 accuracy in [0, 1] of ``network`` on the held-out part of the training set, over all ranks."""

    def loss(self, network: Callable[[Tensor], Tensor]) -> float:
        """Mean cross-entropy of ``network`` on the held-out part of the training set, over all ranks."""


@dataclass
class Task:
    """Everything that a method is given.

    Args:
        model: the network to prune, on ``device``, in eval mode.
        graph: its channel groups.
        budget: what the plan may cost.
        limits: of the plan's widths; ``fitting.fit`` keeps to them.
        device: where tensors live.
        seed: of the whole run; the same on every rank.
        distributed: this process among its peers.
        data: held-out accuracy and facts of the data set; None where the user gave no data.
        rng: a CPU generator with the same state on every rank; the engine saves and restores it.
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

    @cached_property
    def masked(self) -> MaskedNetwork:
        """The network with a gate in front of everything that reads a prunable channel; built when first asked for."""
        return MaskedNetwork(self.graph, self.model)


class Method(ABC):
    """A pruning method. Subclass it, give it a ``Config``, register it in the entry-point group ``fastprune.methods``.

    The order of calls is ``__init__``, ``setup``, ``load_state_dict`` (only when a run is resumed), then the phases in
    order, then ``plan``. All state that the steps change lives in ``state_dict``: a run that is killed anywhere and
    resumed must end with the same plan, bit for bit.

    Class attributes:
        name: what users type; equals the entry point's name.
        paper: the publication, "" for a folklore baseline.
        needs_data: whether the phases read training data.
        trains_weights: whether the phases change the model's parameters or buffers.
        Config: a dataclass; each field with a default and a docstring-like ``metadata["help"]``. It becomes the
            command line's flags and the keys of ``config.yaml``.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False
    trains_weights: ClassVar[bool] = False
    Config: ClassVar[type[Any]]

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def setup(self, task: Task) -> None:  # noqa: B027 - optional hook
        """Create the state (parameters, optimiser) for ``task``; called once, before anything else."""

    def phases(self, task: Task) -> Iterator[Phase | Rounds]:
        """The phases, in order. The same on every rank and on every call. None for a method without a search."""
        return iter(())

    @abstractmethod
    def plan(self, task: Task) -> PruningPlan:
        """The channels that stay. Called once, after the last phase; keeps to ``task.budget`` and ``task.limits``."""

    def results(self) -> Metrics:
        """What to report of the finished search beside the plan; asked for after ``plan``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All state: a nest of dicts and lists of tensors, numbers, strings, booleans and None."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if state:
            raise ValueError(f"method {self.name!r} keeps no state, but a state with keys {sorted(state)} was given")
