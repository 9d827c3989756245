"""Evolutionary search over vectors of choices under a constraint, by asking for candidates and being told their losses.

Source: Zhang and Ou, SP, Alg. 2 and 3. What they leave open is marked "ours" in docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Gene = tuple[int, ...]
Genes = npt.NDArray[np.int64]  # [P, L]

ATTEMPTS = 20  # at finding genes that were not seen before; a small space may have no more


class Space(Protocol):
    """The genes that may be."""

    @property
    def choices(self) -> Sequence[int]:
        """How many choices each position has."""

    def within(self, genes: Genes, rng: np.random.Generator) -> Genes:
        """The same genes [P, L], changed where they do not keep to the constraint so that they do."""


@dataclass(frozen=True)
class EvolutionSettings:
    """How a population evolves.

    Args:
        population: genes per generation; half of the later ones by mutation, half by crossover.
        iterations: generations, the random first one among them.
        mutation: the chance of each position to move to another choice.
        parents: how many of the best genes ever seen have children.
    """

    population: int = 128
    iterations: int = 10
    mutation: float = 0.1
    parents: int = 10


class Evolution:
    """One search. Call ``ask`` for the next generation and ``tell`` its losses, until ``finished``.

    Everything random is a function of the seeds and the generation, so that its state is what has been told.

    Args:
        space: the genes that may be.
        settings: how it evolves.
        seeds: of everything random, non-negative integers.
    """

    def __init__(self, space: Space, settings: EvolutionSettings, seeds: Sequence[int]) -> None:
        self.space, self.settings, self.seeds = space, settings, tuple(seeds)
        self.losses: dict[Gene, float] = {}
        self.generation = 0

    @property
    def finished(self) -> bool:
        """Whether all generations have been told."""
        return self.generation >= self.settings.iterations

    @property
    def best(self) -> tuple[Gene, float]:
        """The gene of least loss, the smaller gene of equal ones, and the loss."""
        gene = self.ranked()[0]
        return gene, self.losses[gene]

    def ranked(self) -> list[Gene]:
        """All genes that were seen, from the least loss on; a loss that is no number is the worst."""
        return sorted(self.losses, key=lambda gene: (np.nan_to_num(self.losses[gene], nan=np.inf), gene))

    def ask(self) -> list[Gene]:
        """The genes of this generation, none of which was seen before; the same on every call before ``tell``."""
        rng = np.random.default_rng([*self.seeds, self.generation])
        size = self.settings.population
        new: dict[Gene, None] = {}
        if self.generation > 0:
            parents = np.array(self.ranked()[: self.settings.parents])
            self.add(new, self.mutated(parents, size - size // 2, rng), rng)
            self.add(new, self.crossed(parents, size // 2, rng), rng)
        for _ in range(ATTEMPTS):
            if len(new) == size:
                break
            self.add(new, self.random(size - len(new), rng), rng)
        return list(new)

    def tell(self, losses: Mapping[Gene, float]) -> None:
        """The losses of the genes that ``ask`` returned."""
        self.losses |= losses
        self.generation += 1

    def add(self, new: dict[Gene, None], genes: Genes, rng: np.random.Generator) -> None:
        """Take in genes, brought within the constraint, that were never seen."""
        for row in self.space.within(genes, rng).tolist():
            gene = tuple(row)
            if gene not in self.losses:
                new[gene] = None

    def random(self, count: int, rng: np.random.Generator) -> Genes:
        """Genes with independent choices."""
        return rng.integers(0, self.space.choices, (count, len(self.space.choices)))

    def mutated(self, parents: Genes, count: int, rng: np.random.Generator) -> Genes:
        """Random parents, each position of which may have moved to another of its choices."""
        choices = np.array(self.space.choices)
        children = parents[rng.integers(0, len(parents), count)]
        moves = rng.random(children.shape) < self.settings.mutation
        others = (children + 1 + rng.integers(0, np.maximum(choices - 1, 1), children.shape)) % choices
        return np.where(moves, others, children)

    def crossed(self, parents: Genes, count: int, rng: np.random.Generator) -> Genes:
        """Each position from one of two random parents."""
        mothers, fathers = (parents[rng.integers(0, len(parents), count)] for _ in range(2))
        return np.where(rng.random(mothers.shape) < 0.5, mothers, fathers)

    def state_dict(self) -> dict[str, Any]:
        """What has been told."""
        return {"generation": self.generation, "losses": packed(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.generation = int(state["generation"])
        self.losses = unpacked(state["losses"])


def packed(losses: Mapping[Gene, float]) -> dict[str, torch.Tensor]:
    """Losses by genes, in their order, as tensors: a search has hundreds of thousands."""
    genes = torch.tensor([list(gene) for gene in losses], dtype=torch.int32)
    return {"genes": genes, "losses": torch.tensor(list(losses.values()), dtype=torch.float64)}


def unpacked(state: Mapping[str, torch.Tensor]) -> dict[Gene, float]:
    """What ``packed`` was given."""
    return dict(zip(map(tuple, state["genes"].tolist()), state["losses"].tolist(), strict=True))
