"""The terms of DDNP in the authors' released code, which differ from the paper's.

Source: Gao et al., ECCV 2022, and their release. The differences, with k the widths and s̄ the raw scores:

* The gates are (soft top-k of the ranking + 0.025, at most 1) times a relaxed gate σ((s̄ + noise + 3)/0.4), through
  which s̄ trains. A width gets the mean of its channels' gradients, so the cross-entropy reaches it.
* Channels are ranked by a moving average of ½ σ(s̄ + noise + 3) + ½ (energy of the channel's features, relative to the
  largest of its group). The energies are measured before the search.
* The cost is that of widths halfway between Ck and the number of open hard gates, and reaches both generators.
* k follows the hard gates: Σ log(|mean gate − k + u| + 1), u uniform in ±0.02.
* The scores are not divided (``generators``), the cost term is |log(T/pT)| with λ = 4, and the term of the widths that
  follow the gates has weight 1 (``ddnp.VARIANTS``).
* AdamW has weight decay for the scores, and a cosine schedule for the widths' learning rate.

The release keeps the sub-network with the best accuracy on the test set; this code keeps the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.methods.gates.ddnp_terms import GatedGroups, StepTerms, Terms, cosine_rate
from fastprune.ops import gumbel_gate, topk_mask
from fastprune.training.phases import Metrics, Phase

BASE, TEMPERATURE = 3.0, 0.4
LEAST, HALF_WINDOW, MEMORY, JITTER, WEIGHT_DECAY = 0.025, 0.05, 0.99, 0.02, 1e-4


class ReleaseTerms(Terms):
    """The terms of the release.

    Args:
        groups: the gated groups.
        learning_rate: the learning rate of AdamW; that of the widths falls to 0.
        epochs: the number of epochs.
        samples: the number of samples on which energies are measured.
        batch_size: samples per step of that measurement.
        seed: the seed of the noise.
    """

    def __init__(
        self, groups: GatedGroups, *, learning_rate: float, epochs: int, samples: int, batch_size: int, seed: int
    ) -> None:
        self.groups, self.learning_rate, self.epochs, self.seed = groups, learning_rate, epochs, seed
        self.samples, self.batch_size = samples, batch_size
        self.windows = 2.0 * (HALF_WINDOW * groups.sizes).floor()
        self.energy = torch.zeros(len(groups.owner), device=groups.sizes.device)
        self.average = torch.zeros_like(self.energy)
        self.steps = 0

    def make_optimizer(self, scores: nn.Module, widths: nn.Module) -> torch.optim.Optimizer:
        """Create AdamW for both generators."""
        groups = [
            {"params": list(scores.parameters()), "weight_decay": WEIGHT_DECAY},
            {"params": list(widths.parameters()), "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)

    def phases(self, energies: Callable[[Any, Any], Tensor]) -> Iterator[Phase]:
        """Yield one phase: the measurement of the channels' energies."""

        def measure(inputs: Any, targets: Any) -> Metrics:
            self.collect(energies(inputs, targets))
            return {}

        yield Phase("features", 1, measure, self.samples, self.batch_size)

    def collect(self, energy: Tensor) -> None:
        """Add the mean squares of the channels' features on a batch, [n]."""
        self.energy += energy

    def relative_energy(self) -> Tensor:
        """Return the energy of each channel relative to the largest of its group, in [0, 1]; [n]."""
        owner = self.groups.owner
        largest = torch.zeros_like(self.groups.sizes, dtype=self.energy.dtype)
        largest = largest.scatter_reduce(0, owner, self.energy, "amax")
        return self.energy / largest.clamp(min=torch.finfo(self.energy.dtype).tiny)[owner]

    def step(self, raw: Tensor, keep: Tensor) -> StepTerms:
        """Compute the gates, the widths and the pursuit; the ranking moves on by a step."""
        mask, hard = self.masks(raw, keep)
        return StepTerms(mask, self.widths(hard, keep), self.pursuit(hard, keep))

    def masks(self, raw: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the gates of a step and hard gates with the same noise, both [n]; update the ranking."""
        noisy: dict[str, Any] = {"seed": self.seed, "step": self.steps, "base": BASE}
        relaxed = gumbel_gate(raw, temperature=TEMPERATURE, hard=False, **noisy)
        hard = gumbel_gate(raw, temperature=TEMPERATURE, hard=True, **noisy)
        with torch.no_grad():
            importance = (gumbel_gate(raw, temperature=1.0, hard=False, **noisy) + self.relative_energy()) / 2
            self.average = importance if self.steps == 0 else torch.lerp(importance, self.average, MEMORY)
            soft = topk_mask(self.average, keep, self.groups.offsets, self.windows.to(raw.dtype))
            soft = (soft + LEAST).clamp(max=1)
        mean = (keep / self.groups.sizes)[self.groups.owner]
        self.steps += 1
        return (soft + mean - mean.detach()) * relaxed, hard

    def widths(self, hard: Tensor, keep: Tensor) -> Tensor:
        """Return the mean of Ck and the number of open hard gates, [L]."""
        return (self.groups.sums(hard) + self.groups.sizes * keep) / 2

    def pursuit(self, hard: Tensor, keep: Tensor) -> Tensor:
        """Compute the term that pulls each width to the fraction of open hard gates.

        Its jitter comes from torch's default generator.
        """
        fraction = self.groups.sums(hard.detach()) / self.groups.sizes
        jitter = (2 * torch.rand_like(keep) - 1) * JITTER
        return torch.log((fraction - keep + jitter).abs() + 1).sum()

    def ranking(self, raw: Tensor) -> Tensor:
        """Return the moving average of importance, which does not depend on ``raw``."""
        return self.average

    def end_epoch(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Lower the learning rate of the widths."""
        optimizer.param_groups[1]["lr"] = cosine_rate(self.learning_rate, epoch + 1, self.epochs)

    def state_dict(self) -> dict[str, Any]:
        """Return energies, ranking and step."""
        state = {"energy": self.energy.clone(), "ranking": self.average.clone(), "step": self.steps}
        return {"release": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        own = state["release"]
        self.energy, self.average = (own[name].to(self.energy) for name in ("energy", "ranking"))
        self.steps = int(own["step"])
