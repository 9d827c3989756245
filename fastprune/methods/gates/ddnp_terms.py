"""The terms of a step of DDNP: the interface of all variants, and the paper's terms.

Source: Gao et al., ECCV 2022, §3.2 to §3.5; noise and schedule are ours. ``ddnp_release`` has the terms of the
authors' published code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprune.methods.gates.gated import fraction_left
from fastprune.ops import gumbel_gate, topk_mask
from fastprune.training.phases import Phase

OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "abs": torch.abs, "square": torch.square}
"""Functions from raw scores to scores, for each value of the option ``output``."""


@dataclass(frozen=True)
class GatedGroups:
    """The gated groups, concatenated in flat vectors over all their channels.

    Args:
        sizes: the number of channels of each group, int64 [L].
        offsets: the first channel of each group, and the number of channels n, int64 [L + 1].
        owner: the group of each channel, int64 [n].
    """

    sizes: Tensor
    offsets: Tensor
    owner: Tensor

    @staticmethod
    def build(sizes: Tensor) -> GatedGroups:
        """Concatenate groups of the given sizes, int64 [L]."""
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return GatedGroups(
            sizes, offsets, torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        )

    def sums(self, values: Tensor) -> Tensor:
        """Add up values [n] of channels in each group, [L]."""
        return values.new_zeros(len(self.sizes)).index_add(0, self.owner, values)


class StepTerms(NamedTuple):
    """The parts of the loss of one step.

    Args:
        mask: the gates of the masked network, [n].
        widths: the number of channels of each group in the cost term, [L].
        coupling: C, the term that ties widths to scores, [].
    """

    mask: Tensor
    widths: Tensor
    coupling: Tensor


class Terms(ABC):
    """One variant of DDNP: the terms of a step, the ranking of channels, and the optimiser."""

    @abstractmethod
    def make_optimizer(self, scores: nn.Module, widths: nn.Module) -> torch.optim.Optimizer:
        """Create the optimiser of both generators."""

    def phases(self, energies: Callable[[Any, Any], Tensor]) -> Iterator[Phase]:
        """Yield the phases before the training.

        Args:
            energies: measures the mean square of each channel's features, [n], on a batch and over all ranks.
        """
        return iter(())

    @abstractmethod
    def step(self, raw: Tensor, keep: Tensor) -> StepTerms:
        """Compute the terms of a step from raw scores s̄ [n] and widths k [L]."""

    @abstractmethod
    def ranking(self, raw: Tensor) -> Tensor:
        """Return the scores that rank the channels of each group, [n]."""

    def end_epoch(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:  # noqa: B027 - optional hook
        """Prepare the epoch after ``epoch``, which counts from 0."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


class MaskTerms(Terms):
    """The paper's terms, with or without noise in the scores.

    Args:
        groups: the gated groups.
        learning_rate: the learning rate of Adam.
        epochs: the number of epochs.
        temperature: t of eq. 5.
        window: γ as a fraction of a group's channels; 0 = hard masks.
        closing: fraction of the epochs, at the end, over which γ falls to 0.
        output: the function from raw scores to scores, a key of ``OUTPUTS``; with noise "sigmoid".
        noise: τ, the scale of the logistic noise that a step adds to raw scores; 0 = none, as in the paper.
        cosine: whether the learning rate falls to 0 along a cosine; constant in the paper.
        seed: the seed of the noise.
    """

    def __init__(
        self,
        groups: GatedGroups,
        *,
        learning_rate: float,
        epochs: int,
        temperature: float,
        window: float,
        closing: float,
        output: str,
        noise: float = 0.0,
        cosine: bool = False,
        seed: int = 0,
    ) -> None:
        self.groups, self.learning_rate, self.temperature = groups, learning_rate, temperature
        self.epochs, self.closing, self.noise, self.cosine, self.seed = epochs, closing, noise, cosine, seed
        self.steps = 0
        self.score = OUTPUTS[output]
        self.windows = (window * groups.sizes).round()
        self.edge = self.edge_in(0)

    def make_optimizer(self, scores: nn.Module, widths: nn.Module) -> torch.optim.Optimizer:
        """Create Adam for both generators."""
        # Fused: 1.1 ms a step instead of 2.8 for ResNet-56's gates, on one core; 2.4 instead of 8.4 for ResNet-50's.
        return torch.optim.Adam([*scores.parameters(), *widths.parameters()], lr=self.learning_rate, fused=True)

    def step(self, raw: Tensor, keep: Tensor) -> StepTerms:
        """Compute the soft masks, the widths Ck and the coupling."""
        mask = self.mask(raw, keep)
        self.steps += 1
        return StepTerms(mask, self.groups.sizes * keep, self.coupling(raw, keep))

    def draw(self, raw: Tensor) -> Tensor:
        """Return the scores of a step, [n]: σ(s̄ + τ G), with logistic noise G of (seed, step, channel)."""
        if not self.noise:
            return self.score(raw)
        # σ((s̄/τ + G)/(1/τ)): one kernel, which draws the same on every device and rank.
        return gumbel_gate(
            raw / self.noise, seed=self.seed, step=self.steps, temperature=1 / self.noise, base=0.0, hard=False,
            noise="logistic",
        )  # fmt: skip

    def mask(self, raw: Tensor, keep: Tensor) -> Tensor:
        """Compute soft top-k masks [n] of all groups (eq. 7), with a straight-through gradient to the scores."""
        scores = self.draw(raw)
        return topk_mask(scores, keep.detach(), self.groups.offsets, self.edge * self.windows.to(scores.dtype))

    def coupling(self, raw: Tensor, keep: Tensor) -> Tensor:
        """Compute C of eq. 5: squared distances of widths from the mean sharpened score, summed over the groups."""
        sharpened = torch.sigmoid(raw / self.temperature)
        distance: Tensor = keep - self.groups.sums(sharpened) / self.groups.sizes
        return distance.square().sum()

    def ranking(self, raw: Tensor) -> Tensor:
        """Return the scores s."""
        return self.score(raw)

    def end_epoch(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Let the windows close and the learning rate fall."""
        self.edge = self.edge_in(epoch + 1)
        if self.cosine:
            optimizer.param_groups[0]["lr"] = cosine_rate(self.learning_rate, epoch + 1, self.epochs)

    def edge_in(self, epoch: int) -> float:
        """Return the factor of the windows in an epoch, counted from 0; 0 in the last one if they close."""
        return fraction_left(epoch, self.epochs, self.closing)

    def state_dict(self) -> dict[str, Any]:
        """Return the factor of the windows and the step."""
        return {"edge": self.edge, "step": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.edge, self.steps = float(state["edge"]), int(state["step"])


def cosine_rate(learning_rate: float, epoch: int, epochs: int) -> float:
    """Return the learning rate after ``epoch`` epochs."""
    return learning_rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
