"""The search spaces of SP: the widths of one stage under a quota, and the quotas of all stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fastprune.methods.sp.evolution import Genes
from fastprune.methods.sp.widths import Widths

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StageWidths:
    """The allowed widths of one stage and their costs.

    Args:
        choices: the allowed widths of each of its groups, ascending.
        cost: function from widths [P, G] to their costs above the smallest widths, [P]; 0 for the smallest.
    """

    choices: tuple[Widths, ...]
    cost: Callable[[npt.NDArray[np.int64]], Floats]

    @cached_property
    def full_cost(self) -> float:
        """The cost of the largest widths."""
        return float(self.costs(np.array([[len(widths) - 1 for widths in self.choices]]))[0])

    def widths(self, gene: Sequence[int]) -> Widths:
        """Return the widths of a gene."""
        return tuple(widths[choice] for widths, choice in zip(self.choices, gene, strict=True))

    def costs(self, genes: Genes) -> Floats:
        """Compute the costs of genes [P, G]."""
        return self.cost(np.array([self.widths(gene) for gene in genes.tolist()]))


@dataclass(frozen=True)
class WidthSpace:
    """The genes of one stage under a quota of its cost: the index of a width for each group.

    Args:
        stage: the widths of the stage.
        quota: the largest cost.
    """

    stage: StageWidths
    quota: float

    @property
    def choices(self) -> Sequence[int]:
        """The number of widths of each group."""
        return [len(widths) for widths in self.stage.choices]

    def repair(self, genes: Genes, rng: np.random.Generator) -> Genes:
        """Make genes above the quota narrower at random positions until they meet it."""
        genes = genes.copy()
        while len(over := np.flatnonzero((self.stage.costs(genes) > self.quota) & genes.any(1))):
            for row in over:
                lower(genes[row], rng)
        return genes


@dataclass(frozen=True)
class QuotaSpace:
    """The genes of the manager: the level of each stage's quota, from none of its cost to all of it.

    Args:
        full_costs: the cost of each stage at full width.
        levels: the number of levels.
        total: the largest sum of the quotas.
    """

    full_costs: Floats
    levels: int
    total: float

    @property
    def choices(self) -> Sequence[int]:
        """The number of levels of each stage; one where it costs the same at any width."""
        return [self.levels if cost > 0 else 1 for cost in self.full_costs]

    def quotas(self, levels: npt.ArrayLike) -> Floats:
        """Return the quotas of levels."""
        return np.asarray(levels) / (self.levels - 1) * self.full_costs

    def repair(self, genes: Genes, rng: np.random.Generator) -> Genes:
        """Lower and raise the levels of genes until their quotas fill the total, to the last level that fits."""
        genes = genes.copy()
        for gene in genes:
            while self.quotas(gene).sum() > self.total and gene.any():
                lower(gene, rng)
            left = self.total - self.quotas(gene).sum()
            for stage in rng.permutation(len(gene)):
                step = self.full_costs[stage] / (self.levels - 1)
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
