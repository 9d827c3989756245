"""What the authors' released code of DDNP computes, where it differs from the paper.

Source: Gao et al., ECCV 2022, and their release; the differences, with k the widths and s̄ the raw scores:

* the gates are (soft top-k of the ranking + 0.025, at most 1) times a relaxed gate σ((s̄ + noise + 3)/0.4), through
  which s̄ is trained; a width gets the mean of its channels' gradients, so the cross-entropy reaches it;
* channels are ranked by a moving average of ½ σ(s̄ + noise + 3) + ½ (energy of the channel's features, relative to the
  largest of its group), which is measured before the search;
* the cost is that of widths halfway between Ck and the number of open hard gates, and reaches both generators;
* k follows the hard gates: Σ log(|mean gate − k + u| + 1), u uniform in ±0.02;
* AdamW with weight decay for the scores, and a cosine schedule for the widths' learning rate.

The release keeps the sub-network of best accuracy on the test set; this takes the last one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.ops import gumbel_gate, topk_mask

BASE, TEMPERATURE = 3.0, 0.4
LEAST, HALF_WINDOW, MEMORY, JITTER, WEIGHT_DECAY = 0.025, 0.05, 0.99, 0.02, 1e-4


class Release:
    """The terms of a step, and the ranking.

    Args:
        sizes: channels of each gated group, int64 [L].
        offsets: [L + 1].
        owner: the group of each channel, [n].
        seed: of the noise.
    """

    def __init__(self, sizes: Tensor, offsets: Tensor, owner: Tensor, seed: int) -> None:
        self.sizes, self.offsets, self.owner, self.seed = sizes, offsets, owner, seed
        self.windows = 2.0 * (HALF_WINDOW * sizes).floor()
        self.energy = torch.zeros(len(owner), device=sizes.device)
        self.ranking = torch.zeros_like(self.energy)
        self.step = 0

    def collect(self, energy: Tensor) -> None:
        """Add a batch's mean squares of the channels' features, [n]."""
        self.energy += energy

    def relative_energy(self) -> Tensor:
        """Of each channel, relative to the largest of its group, in [0, 1]; [n]."""
        largest = torch.zeros_like(self.sizes, dtype=self.energy.dtype)
        largest = largest.scatter_reduce(0, self.owner, self.energy, "amax")
        return self.energy / largest.clamp(min=torch.finfo(self.energy.dtype).tiny)[self.owner]

    def masks(self, raw: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The gates of a step, and hard ones of the same noise; both [n]. Moves the ranking on by a step."""
        noisy: dict[str, Any] = {"seed": self.seed, "step": self.step, "base": BASE}
        relaxed = gumbel_gate(raw, temperature=TEMPERATURE, hard=False, **noisy)
        hard = gumbel_gate(raw, temperature=TEMPERATURE, hard=True, **noisy)
        with torch.no_grad():
            importance = (gumbel_gate(raw, temperature=1.0, hard=False, **noisy) + self.relative_energy()) / 2
            self.ranking = importance if self.step == 0 else torch.lerp(importance, self.ranking, MEMORY)
            soft = topk_mask(self.ranking, keep, self.offsets, self.windows.to(raw.dtype))
            soft = (soft + LEAST).clamp(max=1)
        mean = (keep / self.sizes)[self.owner]
        self.step += 1
        return (soft + mean - mean.detach()) * relaxed, hard

    def widths(self, hard: Tensor, keep: Tensor) -> Tensor:
        """The channels whose cost counts, [L]."""
        return (torch.zeros_like(keep).index_add(0, self.owner, hard) + self.sizes * keep) / 2

    def pursuit(self, hard: Tensor, keep: Tensor) -> Tensor:
        """What draws each width to the part of hard gates that are open. The jitter is torch's default generator's."""
        part = torch.zeros_like(keep).index_add(0, self.owner, hard.detach()) / self.sizes
        jitter = (2 * torch.rand_like(keep) - 1) * JITTER
        return torch.log((part - keep + jitter).abs() + 1).sum()

    def optimizer(self, scores: nn.Module, widths: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """AdamW for both generators."""
        groups = [
            {"params": list(scores.parameters()), "weight_decay": WEIGHT_DECAY},
            {"params": list(widths.parameters()), "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)

    def state_dict(self) -> dict[str, Any]:
        """Energies, ranking and step."""
        return {"energy": self.energy.clone(), "ranking": self.ranking.clone(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.energy, self.ranking = (state[name].to(self.energy) for name in ("energy", "ranking"))
        self.step = int(state["step"])


def cosine(learning_rate: float, epoch: int, epochs: int) -> float:
    """The learning rate behind ``epoch`` epochs."""
    return learning_rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
