"""The base class of methods that train gates on a frozen network, and the placement of the gates."""

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
from fastprune.graph.interior import choose_groups, gated_units
from fastprune.graph.plan import PruningPlan, unique_names
from fastprune.graph.structure import belong_to
from fastprune.methods.contract import Method, Task, is_evaluation_due
from fastprune.networks.masked import GatedCall, MaskedNetwork
from fastprune.networks.replayed import ReplayedNetwork
from fastprune.planning.budget import TOLERANCE, Budget
from fastprune.planning.fitting import fit
from fastprune.training.phases import Metrics, Phase

log = logging.getLogger(__name__)

UNSETTLED = 0.2  # part of the network by which a search misses its plan if its gates hardly moved, or nearly all closed


def prunable_cost(graph: ChannelGraph, budget: Budget, units: Tensor) -> float:
    """Compute the cost of the layers that shrink with ``units``, T_total of the papers.

    Args:
        graph: the network.
        budget: the budget, whose resource is counted.
        units: the units that may be pruned, bool [U].

    Returns:
        MACs of all layers (or parameters of all tensors) that shrink with any of the units, in the full network. For
        ``interior_units`` these are the layers next to a gate: 3609 of ResNet-50's 4089 million MACs. A latency is that
        of the whole network.
    """
    costs = budget.tensor_costs(graph)
    if costs is None:
        return float(budget.cost(graph))
    shrinking = {s.tensor for s in graph.slices if bool(belong_to(s.units, units).any())}
    return float(sum(cost for tensor, cost in costs if tensor in shrinking))


@dataclass(frozen=True)
class GatePlacement:
    """The units with gates, and the ratio of the cost of the layers next to them.

    The user's budget is a fraction of the whole network; the paper's p is a fraction of T, the cost of the layers next
    to gates. λ has the paper's weight only if r and p are relative to T: with full, T and limit in MACs,
    p = 1 − (full − limit)/T and r = 1 − (full − cost)/T.

    Args:
        index: the units with a gate, int64 [n], ascending.
        num_units: the number of units U.
        prunable: T, the cost of the layers next to gates.
        full: the cost of the whole network.
        limit: the largest cost within the budget.
    """

    index: Tensor
    num_units: int
    prunable: float
    full: float
    limit: float

    @staticmethod
    def build(graph: ChannelGraph, budget: Budget, units: Tensor, device: torch.device) -> GatePlacement:
        """Place gates on ``units``, bool [U]."""
        return GatePlacement(
            index=units.nonzero().flatten().to(device),
            num_units=graph.num_units,
            prunable=prunable_cost(graph, budget, units),
            full=float(budget.cost(graph)),
            limit=budget.limit(graph),
        )

    @property
    def target(self) -> float:
        """P of eq. 9."""
        return 1 - (self.full - self.limit) / self.prunable

    def ratio(self, cost: Tensor) -> Tensor:
        """Return r = T̂/T for a cost of the whole network."""
        return 1 - (self.full - cost) / self.prunable

    def units(self) -> Tensor:
        """Return the units with a gate, bool [U] on the CPU."""
        return torch.zeros(self.num_units, dtype=torch.bool).index_fill(0, self.index.cpu(), True)

    def spread(self, gates: Tensor) -> Tensor:
        """Return the flat vector [U] with ``gates`` [n] in their places and 1 elsewhere."""
        if len(gates) == self.num_units:
            return gates
        return gates.new_ones(self.num_units).index_copy(0, self.index, gates)


class GateSearch(Method):
    """A method that trains gates, or their generators, on the frozen network in one phase.

    Its ``Config`` has the options ``epochs, samples, batch_size, augment, evaluate_every`` and ``groups``.

    Class attributes:
        phase: the name of the phase.
    """

    needs_data = True
    phase: ClassVar[str]
    config: Any

    def place_gates(self, task: Task) -> Tensor:
        """Place gates by the option ``groups``; return the units with one, bool [U].

        Raises:
            BudgetError: if the budget is out of reach with these gates; says what is in reach.
        """
        groups = choose_groups(task.graph, self.config.groups)
        if groups != self.config.groups and task.distributed.is_main:
            why = "this network has residual blocks" if groups == "interior" else "this network has no residual blocks"
            log.info("%s: groups auto = %s, because %s", self.name, groups, why)
        units = gated_units(task.graph, groups)
        task.require_feasible(units)
        self.placement = GatePlacement.build(task.graph, task.budget, units, task.device)
        self.masked = MaskedNetwork(task.graph, task.model, units)
        self.replayed = ReplayedNetwork(self.masked)
        self.weights = list(task.model.parameters())
        self._results: dict[str, float] = {}
        return units

    @abstractmethod
    def step_on(self, task: Task, inputs: Any, targets: Any) -> Metrics:
        """Take one step on a batch; return the metrics to log."""

    def data_loss(self, task: Task, inputs: Any, targets: Any, gates: Tensor) -> Tensor:
        """Return the loss of the network under gates [U] on a batch; differentiable in the gates.

        Its gradient must be computed before the next call, which may overwrite the activations.
        """
        output, target = task.objective.run(self.replayed.under(gates), inputs, targets)
        return task.objective.compute(output, target)

    @abstractmethod
    def gates(self) -> Tensor:
        """Return the current hard gates, [n]."""

    def phases(self, task: Task) -> Iterator[Phase]:
        """Yield one phase: the training."""

        def step(inputs: Any, targets: Any) -> Metrics:
            return self.step_on(task, inputs, targets)

        def end_epoch(epoch: int) -> Metrics:
            return self.end_epoch(task, epoch)

        config = self.config
        yield Phase(
            self.phase, config.epochs, step, config.samples, config.batch_size, augment=config.augment,
            end_epoch=end_epoch,
        )  # fmt: skip

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """Return the metrics to log after an epoch, counted from 0."""
        due = is_evaluation_due(epoch, self.config.epochs, self.config.evaluate_every)
        measures = due and task.data is not None and task.data.held_out > 0
        return {**(self.proxy_accuracy(task) if measures else {}), **self.keep_ratios(task)}

    def keep_ratios(self, task: Task) -> Metrics:
        """Return the fraction of each gated group's channels that the hard gates keep, as ``keep/<group>``."""
        mask, gated = self.placement.spread(self.gates().detach()).cpu(), self.placement.units()
        names = zip(unique_names(task.graph), task.graph.groups, strict=True)  # the names that plans use
        return {f"keep/{name}": mask[g.units].float().mean() for name, g in names if bool(gated[g.units].any())}

    def proxy_accuracy(self, task: Task) -> Metrics:
        """Measure the held-out accuracy, or loss, of the network under the hard gates, before any fine-tuning."""
        assert task.data is not None
        with torch.no_grad():
            gates = self.placement.spread(self.gates())
            return {f"proxy_{task.objective.measure_name}": task.measure(GatedCall(self.masked, gates))}

    def keep_open(self, task: Task, open_gates: Tensor, scores: Tensor) -> PruningPlan:
        """Return the plan that keeps the channels of open gates, and at least one channel of each group.

        Args:
            task: the task of the search.
            open_gates: whether each gate is open, bool [U].
            scores: scores of all units, [U]; if the open gates miss the budget or a limit, the plan keeps the channels
                of highest score instead.
        """
        chosen = open_gates.clone()
        for group in task.graph.groups:
            chosen[group.start + int(scores[group.units].numpy().argmax())] = True  # argmax: the first of equal ones
        cost, full, limit = float(task.budget.cost(task.graph, chosen)), self.placement.full, self.placement.limit
        projected = chosen
        if not limit - TOLERANCE * full <= cost <= limit or task.limits.broken_by(task.graph, chosen):
            projected = fit(task.graph, task.budget, scores, prunable=self.placement.units(), limits=task.limits)
        self.record_projection(task, "gates", chosen, projected)
        return task.graph.plan(projected)

    def record_projection(self, task: Task, what: str, chosen: Tensor, projected: Tensor) -> None:
        """Log and record the cost of the search's choice and of the plan made from it, both masks bool [U].

        Both costs, and ``gated_part``, the T of the placement, are relative to the full network.
        """
        budget, full = task.budget, self.placement.full
        cost, final = (float(budget.cost(task.graph, mask)) / full for mask in (chosen, projected))
        self._results = {
            f"{budget.resource}_of_{what}": cost,
            f"{budget.resource}_of_plan": final,
            "channels_changed_by_projection": float((chosen != projected).sum()),
            "gated_part": self.placement.prunable / full,  # places R's target p among the costs in the log
        }
        log.info("the %s cost %.4f of the network, the plan %.4f (budget %s)", what, cost, final, budget)
        if abs(cost - final) > UNSETTLED:
            where, what_to_do = (
                ("above", f"for more epochs than {self.config.epochs}, or with a greater learning rate")
                if cost > final
                else ("below", "with a smaller learning rate")
            )
            log.warning(
                "odd: the %s ended far %s the budget, so the plan is little more than a guess; search %s",
                *(what, where, what_to_do),
            )

    def results(self) -> Metrics:
        """Report the cost of the search's choice and of the plan, relative to the full network."""
        return dict(self._results)


def fraction_left(epoch: int, epochs: int, last: float) -> float:
    """Return what is left, in an epoch counted from 0, of something that vanishes over the last part of a search.

    Args:
        epoch: the epoch.
        epochs: the number of epochs.
        last: the part, as a fraction of the epochs; with 0 nothing vanishes.

    Returns:
        1 before the last part, then less in equal steps, and 0 in the last epoch.
    """
    return min(1.0, max(0, epochs - 1 - epoch) / (last * epochs)) if last else 1.0


@contextmanager
def freeze_weights(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Compute no gradients of these weights within the context; restore the flags afterwards.

    Callers make the list of weights once, not in each step: finding a network's parameters takes as long as some of its
    layers.
    """
    trained = [parameter for parameter in weights if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
