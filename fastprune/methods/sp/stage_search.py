"""SP's search: an evolution over the quotas of stages, and one over the widths of a stage for each quota (Alg. 2, 3).

The losses of stages add up, and the loss of a stage under a quota does not depend on the other quotas. So a quota is
one of a number of levels, a stage is searched once for each level that occurs, and no sub-network is measured twice.
How and where losses are measured is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastprune.methods.sp.evolution import Evolution, EvolutionSettings, Gene, pack_losses, unpack_losses
from fastprune.methods.sp.spaces import QuotaSpace, StageWidths, WidthSpace
from fastprune.methods.sp.widths import Widths

Measure = Callable[[Sequence[tuple[int, Widths]]], Sequence[float]]
"""Function from sub-networks, each a stage and its widths, to their losses."""

PASSES = 3  # searches over quotas; each corrects the quotas by the exact cost of the network before
MANAGER = 1_000_003  # seed of the manager, in the place of a stage's number


@dataclass(frozen=True)
class StageResult:
    """The best gene of one stage under one quota, and its loss."""

    gene: Gene
    loss: float


@dataclass(frozen=True)
class PassResult:
    """The best network of one pass.

    Args:
        loss: the sum of its stages' losses.
        cost: its exact cost above that of the smallest network.
        genes: the gene of each stage.
    """

    loss: float
    cost: float
    genes: list[Gene]


class StageSearch:
    """The whole search, one round at a time; its state can be saved between two rounds.

    Args:
        stages: the widths of each stage.
        total: the largest cost of all stages together above their smallest widths. If it is negative, the smallest
            widths are the result.
        exact_cost: function from the widths of all stages to the cost of the network above that of the smallest. Where
            it is not the sum of the stages' costs (a layer between two stages shrinks with both), the search corrects
            the quotas.
        tolerance: the gap between ``total`` and the exact cost that needs no correction.
        measure: function that measures the losses of sub-networks.
        settings: settings of all evolutions.
        levels: the number of levels of a quota.
        seed: the seed of all random choices.
        concurrent: the number of stage searches that advance by a generation in one round.
        memoise: whether known losses are reused; this changes nothing but the time.
    """

    def __init__(
        self,
        stages: Sequence[StageWidths],
        total: float,
        exact_cost: Callable[[Sequence[Widths]], float],
        tolerance: float,
        measure: Measure,
        settings: EvolutionSettings,
        *,
        levels: int = 64,
        seed: int = 0,
        concurrent: int = 16,
        memoise: bool = True,
    ) -> None:
        self.stages, self.total, self.exact_cost, self.tolerance = tuple(stages), total, exact_cost, tolerance
        self.measure, self.settings, self.levels, self.seed = measure, settings, levels, seed
        self.concurrent, self.memoise = concurrent, memoise
        self.limits = [max(0.0, total)]  # largest sum of the quotas in each pass
        self.passes: list[PassResult] = []
        self.measured = 0
        self.losses: list[dict[Gene, float]] = [{} for _ in self.stages]
        self.found: dict[tuple[int, int], StageResult] = {}  # by stage and level
        self.active: dict[tuple[int, int], Evolution] = {}
        self.begin_pass()

    # --- the manager --------------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Start the manager with the last limit."""
        self.quotas = QuotaSpace(np.array([stage.full_cost for stage in self.stages]), self.levels, self.limits[-1])
        self.manager = Evolution(self.quotas, self.settings, (self.seed, MANAGER, len(self.limits)))

    @property
    def finished(self) -> bool:
        """Return whether the last pass is over."""
        return len(self.passes) == len(self.limits)

    @property
    def best_pass(self) -> PassResult:
        """The pass of least loss among those within the total cost; if there is none, the cheapest one."""
        fitting = [result for result in self.passes if result.cost <= self.total]
        if fitting:
            return min(fitting, key=lambda result: result.loss)
        return min(self.passes, key=lambda result: result.cost)

    @property
    def best(self) -> list[Widths]:
        """The widths of each stage in the resulting network."""
        return [stage.widths(gene) for stage, gene in zip(self.stages, self.best_pass.genes, strict=True)]

    def progress(self) -> tuple[int, int]:
        """Count the finished generations of the manager, and all of them, over the passes that have begun."""
        generations = self.settings.iterations
        done = generations * (len(self.limits) - 1) + self.manager.generation
        return (done, done) if self.finished else (done, generations * len(self.limits))

    def run_round(self) -> dict[str, float]:
        """Run one generation of some stage searches or, if none is missing, of the manager."""
        asked = self.manager.ask()
        missing = sorted({pair for gene in asked for pair in enumerate(gene)} - self.found.keys())
        if missing:
            self.advance(missing[: self.concurrent])
        else:
            losses = {gene: sum(self.best_result(*pair).loss for pair in enumerate(gene)) for gene in asked}
            self.manager.tell(losses)
            if self.manager.finished:
                self.end_pass()
        return self.metrics()

    def end_pass(self) -> None:
        """Record the result; begin a pass with a corrected limit if the network costs too much or too little."""
        results = [self.best_result(*pair) for pair in enumerate(self.manager.best[0])]
        loss, genes = sum(result.loss for result in results), [result.gene for result in results]
        cost = self.exact_cost([stage.widths(gene) for stage, gene in zip(self.stages, genes, strict=True)])
        self.passes.append(PassResult(loss, cost, genes))
        gap = self.total - cost
        if not 0 <= gap <= self.tolerance and len(self.limits) < PASSES:
            limit = min(max(0.0, self.limits[-1] + gap), float(self.quotas.full_costs.sum()))
            if limit != self.limits[-1]:
                self.limits.append(limit)
                self.begin_pass()

    def best_result(self, stage: int, level: int) -> StageResult:
        """Return the best result of a stage under the quota of a level or a lower one."""
        found = [self.found[stage, lower] for lower in range(level + 1) if (stage, lower) in self.found]
        return min(found, key=lambda result: (np.nan_to_num(result.loss, nan=np.inf), result.gene))

    # --- stages -------------------------------------------------------------------------------------------------------

    def advance(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Run one generation of the searches of these stages and levels."""
        for stage, level in pairs:
            if (stage, level) not in self.active:
                self.active[stage, level] = self.make_evolution(stage, level)
        asked = {pair: self.active[pair].ask() for pair in pairs}
        new = [(pair[0], gene) for pair, genes in asked.items() for gene in genes]
        if self.memoise:
            new = [(stage, gene) for stage, gene in dict.fromkeys(new) if gene not in self.losses[stage]]
        losses = self.measure([(stage, self.stages[stage].widths(gene)) for stage, gene in new])
        self.measured += len(new)
        for (stage, gene), loss in zip(new, losses, strict=True):
            self.losses[stage][gene] = float(loss)
        for pair, genes in asked.items():
            self.active[pair].tell({gene: self.losses[pair[0]][gene] for gene in genes})
            if self.active[pair].finished:
                self.found[pair] = StageResult(*self.active.pop(pair).best)

    def make_evolution(self, stage: int, level: int) -> Evolution:
        """Create the search of a stage under the quota of a level."""
        space = WidthSpace(self.stages[stage], level / (self.levels - 1) * self.stages[stage].full_cost)
        return Evolution(space, self.settings, (self.seed, stage, level))

    # --- state --------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return the number of measurements, that of the literal algorithm, and the least loss of the pass.

        At the end it is the loss of the resulting network.
        """
        settings = self.settings
        managers = len(self.manager.losses) + settings.population * settings.iterations * (len(self.limits) - 1)
        counts = {
            "measured": float(self.measured),
            "measured_literally": float(managers * len(self.stages) * settings.population * settings.iterations),
        }
        if self.finished:
            return counts | {"proxy_loss": self.best_pass.loss}
        return counts | ({"proxy_loss": self.manager.best[1]} if self.manager.losses else {})

    def state_dict(self) -> dict[str, Any]:
        """Return limits, results, losses and running searches."""
        return {
            "limits": list(self.limits),
            "results": [[result.loss, result.cost, [list(gene) for gene in result.genes]] for result in self.passes],
            "measured": self.measured,
            "manager": self.manager.state_dict(),
            "losses": [pack_losses(known) for known in self.losses],
            "found": [[*pair, list(result.gene), result.loss] for pair, result in self.found.items()],
            "active": [[*pair, evolution.state_dict()] for pair, evolution in self.active.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.limits = [float(limit) for limit in state["limits"]]
        self.passes = [PassResult(float(a), float(b), [tuple(g) for g in genes]) for a, b, genes in state["results"]]
        self.measured = int(state["measured"])
        self.begin_pass()
        self.manager.load_state_dict(state["manager"])
        self.losses = [unpack_losses(known) for known in state["losses"]]
        self.found = {(int(s), int(level)): StageResult(tuple(gene), loss) for s, level, gene, loss in state["found"]}
        self.active = {}
        for stage, level, saved in state["active"]:
            self.active[stage, level] = self.make_evolution(stage, level)
            self.active[stage, level].load_state_dict(saved)
