"""SP's search: an evolution over the quotas of stages, and one over the widths of a stage for each quota (Alg. 2, 3).

The losses of stages add up, and that of a stage under a quota is the same whatever the other quotas are. So a quota is
one of a number of levels, each stage is searched once for each level that is asked for, and no sub-network is measured
twice. What is measured, and where, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fastprune.methods.sp.evolution import Evolution, EvolutionSettings, Gene, Genes, packed, unpacked
from fastprune.methods.sp.widths import Widths

Floats = npt.NDArray[np.float64]
Measure = Callable[[Sequence[tuple[int, Widths]]], Sequence[float]]
"""The losses of sub-networks, each a stage and its widths."""

PASSES = 3  # over quotas that are corrected by what the whole network has turned out to cost
MANAGER = 1_000_003  # in place of a stage's number, where the seed of the manager is meant


@dataclass(frozen=True)
class StageWidths:
    """The widths that one stage may have.

    Args:
        choices: for each of its groups the widths, ascending.
        cost: what widths [P, G] cost above the smallest ones, [P]; 0 for these.
    """

    choices: tuple[Widths, ...]
    cost: Callable[[npt.NDArray[np.int64]], Floats]

    @cached_property
    def most(self) -> float:
        """The cost of the largest widths."""
        return float(self.costs(np.array([[len(widths) - 1 for widths in self.choices]]))[0])

    def widths(self, gene: Sequence[int]) -> Widths:
        """The widths that a gene stands for."""
        return tuple(widths[choice] for widths, choice in zip(self.choices, gene, strict=True))

    def costs(self, genes: Genes) -> Floats:
        """The costs of genes [P, G]."""
        return self.cost(np.array([self.widths(gene) for gene in genes.tolist()]))


@dataclass(frozen=True)
class WidthSpace:
    """The genes of one stage under a quota of its cost: for each group which of its widths."""

    stage: StageWidths
    quota: float

    @property
    def choices(self) -> Sequence[int]:
        """How many widths each group may have."""
        return [len(widths) for widths in self.stage.choices]

    def within(self, genes: Genes, rng: np.random.Generator) -> Genes:
        """Genes that cost too much, made narrower at random places until they do not."""
        genes = genes.copy()
        while len(over := np.flatnonzero((self.stage.costs(genes) > self.quota) & genes.any(1))):
            for row in over:
                lower(genes[row], rng)
        return genes


@dataclass(frozen=True)
class QuotaSpace:
    """The genes of the manager: for each stage the level of its quota, from none of its cost to all of it.

    Args:
        most: the cost of each stage.
        levels: how many there are.
        total: what the quotas may be together.
    """

    most: Floats
    levels: int
    total: float

    @property
    def choices(self) -> Sequence[int]:
        """How many levels each stage has; one where it costs the same at any width."""
        return [self.levels if most > 0 else 1 for most in self.most]

    def quotas(self, levels: npt.ArrayLike) -> Floats:
        """The quotas of levels."""
        return np.asarray(levels) / (self.levels - 1) * self.most

    def within(self, genes: Genes, rng: np.random.Generator) -> Genes:
        """Genes whose quotas are the total, to the last level that fits."""
        genes = genes.copy()
        for gene in genes:
            while self.quotas(gene).sum() > self.total and gene.any():
                lower(gene, rng)
            left = self.total - self.quotas(gene).sum()
            for stage in rng.permutation(len(gene)):
                step = self.most[stage] / (self.levels - 1)
                if step > 0:
                    rise = min(int(left / step), self.levels - 1 - int(gene[stage]))
                    gene[stage] += rise
                    left -= rise * step
        return genes


def lower(gene: npt.NDArray[np.int64], rng: np.random.Generator) -> None:
    """Move a random position of a gene that is above 0 to a random lower choice, in place."""
    above = np.flatnonzero(gene)
    position = above[rng.integers(len(above))]
    gene[position] = rng.integers(gene[position])


@dataclass(frozen=True)
class Found:
    """What the search of one stage under one quota has found."""

    gene: Gene
    loss: float


class StageSearch:
    """The whole search, a round at a time; its state can be saved between two rounds.

    Args:
        stages: the widths of each.
        total: what all stages may cost together above their smallest widths. Below 0 these are the result.
        exact: the cost of the assembled network above that of the smallest, from the widths of all stages. Where it is
            not the sum of the stages' (a layer between two stages shrinks with both), the quotas are corrected.
        tolerance: how far below ``total`` the exact cost may be without a correction.
        measure: the losses of sub-networks.
        settings: of all evolutions.
        levels: of a quota.
        seed: of everything random.
        at_once: how many stage searches run beside each other, a generation of each in a round.
        memoise: whether losses that are known are not measured again; changes nothing but the time.
    """

    def __init__(
        self,
        stages: Sequence[StageWidths],
        total: float,
        exact: Callable[[Sequence[Widths]], float],
        tolerance: float,
        measure: Measure,
        settings: EvolutionSettings,
        *,
        levels: int = 64,
        seed: int = 0,
        at_once: int = 16,
        memoise: bool = True,
    ) -> None:
        self.stages, self.total, self.exact, self.tolerance = tuple(stages), total, exact, tolerance
        self.measure, self.settings, self.levels, self.seed = measure, settings, levels, seed
        self.at_once, self.memoise = at_once, memoise
        self.limits = [max(0.0, total)]  # of the quotas together, in each pass
        self.results: list[tuple[float, float, list[Gene]]] = []  # of each pass: loss, exact cost, genes
        self.measured = 0
        self.losses: list[dict[Gene, float]] = [{} for _ in self.stages]
        self.found: dict[tuple[int, int], Found] = {}
        self.active: dict[tuple[int, int], Evolution] = {}
        self.begin_pass()

    # --- the manager --------------------------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Start the manager with the last limit."""
        self.quotas = QuotaSpace(np.array([stage.most for stage in self.stages]), self.levels, self.limits[-1])
        self.manager = Evolution(self.quotas, self.settings, (self.seed, MANAGER, len(self.limits)))

    @property
    def finished(self) -> bool:
        """Whether the last pass is over."""
        return len(self.results) == len(self.limits)

    @property
    def chosen(self) -> tuple[float, float, list[Gene]]:
        """The result of least loss among those that cost no more than they may; where none does, the cheapest one."""
        fitting = [result for result in self.results if result[1] <= self.total]
        if fitting:
            return min(fitting, key=lambda result: result[0])
        return min(self.results, key=lambda result: result[1])

    @property
    def best(self) -> list[Widths]:
        """The widths of each stage in the network that was chosen."""
        return [stage.widths(gene) for stage, gene in zip(self.stages, self.chosen[2], strict=True)]

    def progress(self) -> tuple[int, int]:
        """The generations of the manager that are done, and all of them, of the passes that have begun."""
        generations = self.settings.iterations
        done = generations * (len(self.limits) - 1) + self.manager.generation
        return (done, done) if self.finished else (done, generations * len(self.limits))

    def round(self) -> dict[str, float]:
        """One generation of some stage searches, or, where none is left to do, of the manager."""
        asked = self.manager.ask()
        missing = sorted({pair for gene in asked for pair in enumerate(gene)} - self.found.keys())
        if missing:
            self.advance(missing[: self.at_once])
        else:
            self.manager.tell({gene: sum(self.least(*pair).loss for pair in enumerate(gene)) for gene in asked})
            if self.manager.finished:
                self.end_pass()
        return self.metrics()

    def end_pass(self) -> None:
        """Take the result, and correct the limit of the quotas where the network costs too much or too little."""
        taken = [self.least(*pair) for pair in enumerate(self.manager.best[0])]
        loss, genes = sum(found.loss for found in taken), [found.gene for found in taken]
        cost = self.exact([stage.widths(gene) for stage, gene in zip(self.stages, genes, strict=True)])
        self.results.append((loss, cost, genes))
        off = self.total - cost
        if not 0 <= off <= self.tolerance and len(self.limits) < PASSES:
            limit = min(max(0.0, self.limits[-1] + off), float(self.quotas.most.sum()))
            if limit != self.limits[-1]:
                self.limits.append(limit)
                self.begin_pass()

    def least(self, stage: int, level: int) -> Found:
        """What was found for a stage under the quota of a level, or under a smaller one if that is better."""
        found = [self.found[stage, lower] for lower in range(level + 1) if (stage, lower) in self.found]
        return min(found, key=lambda one: (np.nan_to_num(one.loss, nan=np.inf), one.gene))

    # --- stages -------------------------------------------------------------------------------------------------------

    def advance(self, pairs: Sequence[tuple[int, int]]) -> None:
        """One generation of the searches of these stages and levels."""
        for stage, level in pairs:
            if (stage, level) not in self.active:
                self.active[stage, level] = self.evolution(stage, level)
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
                self.found[pair] = Found(*self.active.pop(pair).best)

    def evolution(self, stage: int, level: int) -> Evolution:
        """The search of a stage under the quota of a level."""
        space = WidthSpace(self.stages[stage], level / (self.levels - 1) * self.stages[stage].most)
        return Evolution(space, self.settings, (self.seed, stage, level))

    # --- state --------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """How much was measured, how much the algorithm would measure to the letter, and the least loss of the pass.

        In the end it is the loss of the network that was chosen.
        """
        settings = self.settings
        managers = len(self.manager.losses) + settings.population * settings.iterations * (len(self.limits) - 1)
        found = {
            "measured": float(self.measured),
            "measured_literally": float(managers * len(self.stages) * settings.population * settings.iterations),
        }
        if self.finished:
            return found | {"distillation_loss": self.chosen[0]}
        return found | ({"distillation_loss": self.manager.best[1]} if self.manager.losses else {})

    def state_dict(self) -> dict[str, Any]:
        """Everything that has been found."""
        return {
            "limits": list(self.limits),
            "results": [[loss, cost, [list(gene) for gene in genes]] for loss, cost, genes in self.results],
            "measured": self.measured,
            "manager": self.manager.state_dict(),
            "losses": [packed(known) for known in self.losses],
            "found": [[*pair, list(found.gene), found.loss] for pair, found in self.found.items()],
            "active": [[*pair, evolution.state_dict()] for pair, evolution in self.active.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.limits = [float(limit) for limit in state["limits"]]
        self.results = [(float(a), float(b), [tuple(gene) for gene in genes]) for a, b, genes in state["results"]]
        self.measured = int(state["measured"])
        self.begin_pass()
        self.manager.load_state_dict(state["manager"])
        self.losses = [unpacked(known) for known in state["losses"]]
        self.found = {(int(s), int(level)): Found(tuple(gene), loss) for s, level, gene, loss in state["found"]}
        self.active = {}
        for stage, level, saved in state["active"]:
            self.active[stage, level] = self.evolution(stage, level)
            self.active[stage, level].load_state_dict(saved)
