"""What methods that train gates on a frozen network share: where gates are, and the search around a step."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastprune.graph import ChannelGraph
from fastprune.graph.interior import gated_units
from fastprune.graph.plan import PruningPlan, unique_names
from fastprune.methods.contract import Method, Task
from fastprune.networks.masked import MaskedNetwork
from fastprune.planning.budget import TOLERANCE, Budget
from fastprune.planning.fitting import fit
from fastprune.training.phases import Metrics, Phase

log = logging.getLogger(__name__)


def prunable_cost(graph: ChannelGraph, budget: Budget, units: Tensor) -> float:
    """The cost of the layers that some of ``units`` can make smaller, T_total of the papers.

    Args:
        graph: the network.
        budget: says which cost is meant.
        units: bool [U].

    Returns:
        MACs of all layers (or parameters of all tensors) that shrink with any of the units, in the full network. For
        ``interior_units`` these are the layers next to a gate: 3609 of ResNet-50's 4089 million MACs. A latency counts
        as a whole.
    """
    costs = budget.tensor_costs(graph)
    if costs is None:
        return float(budget.cost(graph))
    shrinking = {s.tensor for s in graph.slices if bool(units[s.units[s.units >= 0]].any())}
    return float(sum(cost for tensor, cost in costs if tensor in shrinking))


@dataclass(frozen=True)
class GatePlacement:
    """Where the gates are, and how a cost of the whole network reads as the ratio of what they control.

    The user's budget is a part of the whole network; the paper's p is a part of T, the cost of the layers next to
    gates. Only with r and p relative to T does λ weigh as much as in the paper: with full, T and limit in MACs,
    p = 1 − (full − limit)/T and r = 1 − (full − cost)/T.

    Args:
        index: units with a gate, int64 [n], ascending.
        num_units: U.
        prunable: T.
        full: cost of the whole network.
        limit: of the budget.
    """

    index: Tensor
    num_units: int
    prunable: float
    full: float
    limit: float

    @staticmethod
    def of(graph: ChannelGraph, budget: Budget, may_go: Tensor, device: torch.device) -> GatePlacement:
        """Gates on the units ``may_go``, bool [U]."""
        return GatePlacement(
            index=may_go.nonzero().flatten().to(device),
            num_units=graph.num_units,
            prunable=prunable_cost(graph, budget, may_go),
            full=float(budget.cost(graph)),
            limit=budget.limit(graph),
        )

    @property
    def target(self) -> float:
        """The p of eq. 9."""
        return 1 - (self.full - self.limit) / self.prunable

    def ratio(self, cost: Tensor) -> Tensor:
        """The r = T̂/T of a cost of the whole network."""
        return 1 - (self.full - cost) / self.prunable

    def may_go(self) -> Tensor:
        """The units with a gate, bool [U] on the CPU."""
        return torch.zeros(self.num_units, dtype=torch.bool).index_fill(0, self.index.cpu(), True)

    def spread(self, gates: Tensor) -> Tensor:
        """The flat vector [U] with ``gates`` [n] in their places and 1 elsewhere."""
        if len(gates) == self.num_units:
            return gates
        return gates.new_ones(self.num_units).index_copy(0, self.index, gates)


class GateSearch(Method):
    """A method that trains what makes the gates of the frozen network, in one phase.

    Its ``Config`` has the options ``epochs, samples, batch_size, augment, evaluate_every`` and ``groups``.

    Class attributes:
        phase: the phase's name.
    """

    needs_data = True
    phase: ClassVar[str]
    config: Any

    def place_gates(self, task: Task) -> Tensor:
        """Put gates where the option ``groups`` has them; the units with one, bool [U].

        Raises:
            BudgetError: if the budget is out of reach with these gates; says what is in reach.
        """
        may_go = gated_units(task.graph, self.config.groups)
        # Raises before a search that cannot succeed.
        fit(task.graph, task.budget, torch.zeros(task.graph.num_units), prunable=may_go, limits=task.limits)
        self.placement = GatePlacement.of(task.graph, task.budget, may_go, task.device)
        self.masked = MaskedNetwork(task.graph, task.model, may_go)
        self.weights = list(task.model.parameters())
        self._results: dict[str, float] = {}
        return may_go

    @abstractmethod
    def step_on(self, task: Task, images: Tensor, labels: Tensor) -> Metrics:
        """One iteration on a batch; the metrics to log."""

    @abstractmethod
    def gates(self) -> Tensor:
        """The hard gates that there are now, [n]."""

    def phases(self, task: Task) -> Iterator[Phase]:
        """One phase: the training."""

        def step(images: Tensor, labels: Tensor) -> Metrics:
            return self.step_on(task, images, labels)

        def end_epoch(epoch: int) -> Metrics:
            return self.end_epoch(task, epoch)

        config = self.config
        yield Phase(
            self.phase, config.epochs, step, config.samples, config.batch_size, augment=config.augment,
            end_epoch=end_epoch,
        )  # fmt: skip

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """What is logged after an epoch, counted from 0."""
        measures = self.evaluates_after(epoch) and task.data is not None and task.data.held_out > 0
        return {**(self.proxy_accuracy(task) if measures else {}), **self.widths_now(task)}

    def evaluates_after(self, epoch: int) -> bool:
        """Whether the held-out accuracy is measured after ``epoch`` (from 0)."""
        every: int = self.config.evaluate_every
        return every > 0 and ((epoch + 1) % every == 0 or epoch + 1 == self.config.epochs)

    def widths_now(self, task: Task) -> Metrics:
        """The part of each gated group's channels that the hard gates leave now, as ``keep/<group>``."""
        mask, gated = self.placement.spread(self.gates().detach()).cpu(), self.placement.may_go()
        names = zip(unique_names(task.graph), task.graph.groups, strict=True)  # as plans have them
        return {f"keep/{name}": mask[g.units].float().mean() for name, g in names if bool(gated[g.units].any())}

    def proxy_accuracy(self, task: Task) -> Metrics:
        """Held-out accuracy of the network that the hard gates leave now, before any fine-tuning."""
        assert task.data is not None
        with torch.no_grad():
            gates = self.placement.spread(self.gates())
            return {"proxy_accuracy": task.data.accuracy(lambda images: self.masked(images, gates))}

    def keep_open(self, task: Task, open_gates: Tensor, scores: Tensor) -> PruningPlan:
        """The plan of gates that are open or closed, and one channel of each group at least.

        Args:
            task: of the search.
            open_gates: bool [U].
            scores: [U]; where the open gates miss the budget or a limit, the channels of highest score stay instead.
        """
        chosen = open_gates.clone()
        for group in task.graph.groups:
            chosen[group.start + int(scores[group.units].numpy().argmax())] = True  # the first of equal ones
        cost, full, limit = float(task.budget.cost(task.graph, chosen)), self.placement.full, self.placement.limit
        projected = chosen
        if not limit - TOLERANCE * full <= cost <= limit or task.limits.broken_by(task.graph, chosen):
            projected = fit(task.graph, task.budget, scores, prunable=self.placement.may_go(), limits=task.limits)
        self.note_projection(task, "gates", chosen, projected)
        return task.graph.plan(projected)

    def note_projection(self, task: Task, what: str, chosen: Tensor, projected: Tensor) -> None:
        """Remember and log what the search chose, and what the plan makes of it; both bool [U]."""
        budget, full = task.budget, self.placement.full
        cost, final = (float(budget.cost(task.graph, mask)) / full for mask in (chosen, projected))
        self._results = {
            f"{budget.resource}_of_{what}": cost,
            f"{budget.resource}_of_plan": final,
            "channels_changed_by_projection": float((chosen != projected).sum()),
        }
        log.info("the %s cost %.4f of the network, the plan %.4f (budget %s)", what, cost, final, budget)

    def results(self) -> Metrics:
        """Cost of what the search chose and of the plan, as parts of the full network."""
        return dict(self._results)


@contextmanager
def weights_frozen(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradient reaches these weights, so none is computed or stored for; the flags are put back afterwards.

    A list of them is made once, not in each step: to find a network's parameters takes as long as some of its layers.
    """
    trained = [parameter for parameter in weights if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
