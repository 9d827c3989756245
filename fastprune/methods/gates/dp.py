"""Differentiable pruning with Gumbel-sigmoid gates: the baseline of Gao et al., ECCV 2022 (DDNP), Fig. 3 and 4.

One number z per channel decides whether the channel is kept; together, the z of a layer decide how many are. DDNP
separates the two. The network is frozen. One step, with r the cost ratio under the drawn gates:

    gate = 1[y ≥ ½],  y = σ((z + b + noise)/t)           the gradient is that of y
    J = cross-entropy(masked network) + λ R(r, p)

At the end the channels with z + b ≥ 0 are kept. The scores z come from DDNP's generator, or are parameters themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastprune.graph.interior import GROUPS
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Task
from fastprune.methods.gates.gated import GateSearch, freeze_weights
from fastprune.methods.gates.generators import ScoreGenerator, apply_gradients, copy_state, restore_state
from fastprune.methods.gates.regularisers import SIDES
from fastprune.ops import gumbel_gate
from fastprune.options import option
from fastprune.training.phases import Metrics


@dataclass(frozen=True)
class RelaxedGates:
    """Options of gates that noise relaxes, and of the generator of their scores."""

    temperature: float = option(0.4, "t, the temperature of the gates", minimum=1e-3)
    base: float = option(3.0, "b, added to the scores; with 3 nearly all gates start open")
    noise: Literal["gumbel", "logistic"] = option(
        "gumbel",
        "gumbel: one Gumbel sample, as in the authors' releases; logistic: noise that makes P(open) = σ(z + b)",
    )
    architecture: Literal["gru", "fc", "channel"] = option(
        "gru", "generator of the scores: gru (GRU and linear layers), fc (linear layers), channel (one parameter each)"
    )


@dataclass(frozen=True)
class DPConfig(RelaxedGates):
    """Options of DP; where DDNP has them the defaults are DDNP's, as its paper compares the two (with λ = 2)."""

    epochs: int = option(200, "passes over the samples", minimum=1)
    samples: int = option(2500, "random training samples to search on", minimum=1)
    batch_size: int = option(256, "samples per step over all processes together", minimum=1)
    learning_rate: float = option(1e-3, "learning rate of Adam, constant", minimum=0.0)
    regularisation: float = option(4.0, "λ, the weight of the cost term", minimum=0.0)
    resource: Literal["one_sided", "two_sided"] = option(
        "one_sided", "cost term: log(max(T, pT)/pT), or |log(T/pT)|, which also raises a cost below pT"
    )
    groups: Literal["auto", "interior", "all"] = option("auto", GROUPS)
    augment: bool = option(False, "search on augmented images")
    evaluate_every: int = option(10, "epochs between two held-out accuracies of the current plan; 0 = never", minimum=0)


class DP(GateSearch):
    """Learn one relaxed gate per channel: differentiable pruning as before DDNP, whose baseline it is.

    The weights do not change.
    """

    name = "dp"
    paper = "Gao et al., Disentangled Differentiable Network Pruning, ECCV 2022 (its baseline)"
    phase = "gates"
    Config: ClassVar[type[Any]] = DPConfig
    config: Any

    def setup(self, task: Task) -> None:
        """Create the generator and its optimiser.

        Raises:
            BudgetError: if the budget is out of reach with these gates; says what is in reach.
        """
        units = self.place_gates(task)
        sizes = [group.size for group in task.graph.groups if bool(units[group.start])]
        self.scores = self.make_generator(sizes, task.seed).to(task.device)
        self.optimizer = self.make_optimizer()
        self.step = 0

    def make_generator(self, sizes: list[int], seed: int) -> ScoreGenerator:
        """Create the generator of the scores of groups of the given sizes."""
        return ScoreGenerator(sizes, self.config.architecture, seed)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Create the optimiser of the generator."""
        return torch.optim.Adam(self.scores.parameters(), lr=self.config.learning_rate, fused=True)

    def cost_term(self, ratio: Tensor) -> Tensor:
        """Compute R of the cost ratio r = T̂/T under the gates."""
        return SIDES[self.config.resource](ratio, self.placement.target)

    def step_on(self, task: Task, inputs: Any, targets: Any) -> Metrics:
        """Take one step."""
        config, parameters = self.config, list(self.scores.parameters())
        with torch.autocast(task.device.type, enabled=False):  # bfloat16 would round different scores to equal ones
            gates = self.placement.spread(self.draw(self.scores(), task.seed))
        with freeze_weights(self.weights):
            data_loss = self.data_loss(task, inputs, targets, gates)
            cost = task.budget.cost(task.graph, gates)
            regulariser = self.cost_term(self.placement.ratio(cost))
            loss = data_loss + config.regularisation * regulariser.float()
            gradients = torch.autograd.grad(loss, parameters)
        apply_gradients(self.optimizer, parameters, gradients, task.distributed)
        self.step += 1
        return {
            "loss": loss.detach(),
            task.objective.loss_name: data_loss.detach(),
            "regulariser": regulariser.detach(),
            f"{task.budget.resource}_ratio": cost.detach() / self.placement.full,
            "open": gates.detach()[self.placement.index].mean(),
        }

    def draw(self, scores: Tensor, seed: int) -> Tensor:
        """Draw the gates of a step, [n]."""
        config = self.config
        return gumbel_gate(
            scores, seed=seed, step=self.step, temperature=config.temperature, base=config.base, noise=config.noise
        )

    def gates(self) -> Tensor:
        """Return the gates without noise, [n]."""
        gates: Tensor = (self.current_scores() + self.config.base >= 0).float()
        return gates

    def current_scores(self) -> Tensor:
        """Return the scores of all gates, [n], without gradients."""
        with torch.autocast(self.placement.index.device.type, enabled=False):  # as in ``step_on``
            scores: Tensor = self.scores()
        return scores.detach()

    def plan(self, task: Task) -> PruningPlan:
        """Keep z + b ≥ 0; if that misses the budget, keep the channels of highest z."""
        scores = torch.full((task.graph.num_units,), torch.inf, dtype=torch.float64)
        scores[self.placement.index.cpu()] = self.current_scores().cpu().double() + self.config.base
        return self.keep_open(task, scores >= 0, scores)

    def state_dict(self) -> dict[str, Any]:
        """Return the generator with its input, the optimiser's moments and the step."""
        return {**copy_state(self.optimizer, scores=self.scores), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is for other gates.
        """
        restore_state(self.name, state, self.optimizer, scores=self.scores)
        self.step = int(state["step"])
