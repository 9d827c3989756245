"""Evolutionary search over vectors of choices under a constraint; the caller measures the losses of its candidates.

Source: Zhang and Ou, SP, Alg. 2 and 3. docs/decisions/041-search-stages-on-levels-and-memoise.md records what
they leave open and our choices.
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

ATTEMPTS = 20  # tries to find unseen genes; a small space may have none left


class Space(Protocol):
    """The allowed genes."""

    @property
    def choices(self) -> Sequence[int]:
        """The number of choices of each position."""

    def repair(self, genes: Genes, rng: np.random.Generator) -> Genes:
        """Change genes [P, L] that violate the constraint until they meet it; return all of them."""


@dataclass(frozen=True)
class EvolutionSettings:
    """Settings of an evolution.

    Args:
        population: genes per generation; from the second on, half come from mutation and half from crossover.
        iterations: number of generations, including the random first one.
        mutation: probability of each position to move to another choice.
        parents: number of the best genes so far that have children.
    """

    population: int = 128
    iterations: int = 10
    mutation: float = 0.1
    parents: int = 10


class Evolution:
    """One search. Call ``ask`` for the next generation and ``tell`` its losses, until ``finished``.

    All random choices are functions of the seeds and the generation, so the state is only the losses told so far.

    Args:
        space: the allowed genes.
        settings: the settings of the evolution.
        seeds: seeds of all random choices, non-negative integers.
    """

    def __init__(self, space: Space, settings: EvolutionSettings, seeds: Sequence[int]) -> None:
        self.space, self.settings, self.seeds = space, settings, tuple(seeds)
        self.losses: dict[Gene, float] = {}
        self.generation = 0

    @property
    def finished(self) -> bool:
        """Return whether all generations have been told."""
        return self.generation >= self.settings.iterations

    @property
    def best(self) -> tuple[Gene, float]:
        """The gene of least loss, and the loss; among equal losses the smallest gene."""
        gene = self.ranking()[0]
        return gene, self.losses[gene]

    def ranking(self) -> list[Gene]:
        """Return all genes seen so far, by ascending loss; NaN is the worst."""
        return sorted(self.losses, key=lambda gene: (np.nan_to_num(self.losses[gene], nan=np.inf), gene))

    def ask(self) -> list[Gene]:
        """Return the genes of this generation, all unseen; the same ones on every call before ``tell``."""
        rng = np.random.default_rng([*self.seeds, self.generation])
        size = self.settings.population
        new: dict[Gene, None] = {}
        if self.generation > 0:
            parents = np.array(self.ranking()[: self.settings.parents])
            self.add(new, self.mutate(parents, size - size // 2, rng), rng)
            self.add(new, self.cross(parents, size // 2, rng), rng)
        for _ in range(ATTEMPTS):
            if len(new) == size:
                break
            self.add(new, self.random_genes(size - len(new), rng), rng)
        return list(new)

    def tell(self, losses: Mapping[Gene, float]) -> None:
        """Record the losses of the genes that ``ask`` returned."""
        self.losses |= losses
        self.generation += 1

    def add(self, new: dict[Gene, None], genes: Genes, rng: np.random.Generator) -> None:
        """Repair genes and add the unseen ones to ``new``."""
        for row in self.space.repair(genes, rng).tolist():
            gene = tuple(row)
            if gene not in self.losses:
                new[gene] = None

    def random_genes(self, count: int, rng: np.random.Generator) -> Genes:
        """Draw genes with independent choices."""
        return rng.integers(0, self.space.choices, (count, len(self.space.choices)))

    def mutate(self, parents: Genes, count: int, rng: np.random.Generator) -> Genes:
        """Draw random parents and move random positions of them to another choice."""
        choices = np.array(self.space.choices)
        children = parents[rng.integers(0, len(parents), count)]
        moves = rng.random(children.shape) < self.settings.mutation
        others = (children + 1 + rng.integers(0, np.maximum(choices - 1, 1), children.shape)) % choices
        return np.where(moves, others, children)

    def cross(self, parents: Genes, count: int, rng: np.random.Generator) -> Genes:
        """Take each position of a child from one of two random parents."""
        mothers, fathers = (parents[rng.integers(0, len(parents), count)] for _ in range(2))
        return np.where(rng.random(mothers.shape) < 0.5, mothers, fathers)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses told so far."""
        return {"generation": self.generation, "losses": pack_losses(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.generation = int(state["generation"])
        self.losses = unpack_losses(state["losses"])


def pack_losses(losses: Mapping[Gene, float]) -> dict[str, torch.Tensor]:
    """Pack losses by genes, in their order, into tensors: a search has hundreds of thousands."""
    genes = torch.tensor([list(gene) for gene in losses], dtype=torch.int32)
    return {"genes": genes, "losses": torch.tensor(list(losses.values()), dtype=torch.float64)}


def unpack_losses(state: Mapping[str, torch.Tensor]) -> dict[Gene, float]:
    """Undo ``pack_losses``."""
    return dict(zip(map(tuple, state["genes"].tolist()), state["losses"].tolist(), strict=True))
