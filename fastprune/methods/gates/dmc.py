"""Discrete Model Compression (Gao, Huang, Pei and Huang, CVPR 2020): train one discrete gate per channel, nothing else.

The network is frozen. Each gate has one parameter θ in [0, 1] and is open with probability θ. One step (Algorithm 1),
with r the cost ratio under the deterministic gates 1[θ ≥ ½] and p its target:

    loss = cross-entropy(masked network, stochastic gates) + λ · log(|r − p| + 1)
    θ ← Adam(θ, ∂loss/∂θ)            straight-through: the gradient of the gate is the gradient of θ
    θ ← θ − β · sign(θ − ½)          symmetric decay keeps the gates undecided, which keeps the search wide
    θ ← clip(θ, 0, 1)

At the end the channels with θ ≥ ½ are kept.

With ``variant=paper`` that is all: the cross-entropy sees networks around the one that is returned, never that one.
With ``variant=annealed``, the default, gates of the last third of the epochs open with probability ½ + κ (θ − ½), where
κ rises from 1 until the last epoch runs on the deterministic gates. λ is twice the paper's there, as in the authors'
later code, with which the gates come down to the budget in half of the steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastprune.graph.interior import GROUPS
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Task
from fastprune.methods.gates.gated import GateSearch, fraction_left, freeze_weights
from fastprune.methods.gates.gates import deterministic_gate, straight_through
from fastprune.methods.gates.regularisers import log_distance
from fastprune.methods.scores.filters import unit_norms
from fastprune.methods.scores.ranking import normalise_scores
from fastprune.networks.masked import GatedCall
from fastprune.ops import bernoulli_gate
from fastprune.options import option, settle
from fastprune.training.phases import Metrics


@dataclass(frozen=True)
class DMCConfig:
    """Options of DMC; the defaults are the paper's for CIFAR-10 (§4.1), where the variant does not say otherwise."""

    variant: Literal["annealed", "paper"] = option(
        "annealed",
        "paper: as in the paper; annealed: twice its weight of the cost, and gates deterministic at the end",
    )
    epochs: int = option(300, "passes over the samples", minimum=1)
    samples: int = option(2500, "random training samples to search on; the paper takes 10000 on ImageNet", minimum=1)
    batch_size: int = option(256, "samples per step over all processes together", minimum=1)
    learning_rate: float = option(1e-3, "learning rate of Adam, constant", minimum=0.0)
    regularisation: float | None = option(
        None,
        "λ, the weight of the cost term; none = that of the variant: 8, paper: 4; the paper takes 8 on ImageNet",
        minimum=0.0,
    )
    annealing: float | None = option(
        None,
        "fraction of the epochs, at the end, in which drawn gates become deterministic; none = that of the variant: "
        "1/3, paper: 0",
        minimum=0.0,
        maximum=1.0,
    )
    decay: float = option(1e-4, "β, the step towards ½ after each update", minimum=0.0, maximum=0.5)
    sampling: Literal["stochastic", "deterministic"] = option(
        "stochastic", "gates of the cross-entropy term: drawn with probability θ (eq. 4), or θ ≥ ½ (eq. 1)"
    )
    groups: Literal["auto", "interior", "one_gate", "all"] = option(
        "auto", f"{GROUPS}; one_gate: only the last gate of each block"
    )
    augment: bool = option(False, "search on augmented images")
    evaluate_every: int = option(10, "epochs between two held-out accuracies of the current plan; 0 = never", minimum=0)

    def resolve(self) -> DMCConfig:
        """Return these options with those of the variant where they are None."""
        return settle(self, VARIANTS[self.variant])


VARIANTS: dict[str, dict[str, Any]] = {
    "annealed": {"regularisation": 8.0, "annealing": 1 / 3},
    "paper": {"regularisation": 4.0, "annealing": 0.0},
}
"""Options that each variant sets where the user leaves them out."""


class DMC(GateSearch):
    """Learn which channels to keep: one discrete, stochastic gate per channel, trained under the budget.

    The weights do not change; only the gates train, by straight-through gradients.
    """

    name = "dmc"
    paper = "Gao et al., Discrete Model Compression with Resource Constraint for Deep Neural Networks, CVPR 2020"
    phase = "gates"
    Config: ClassVar[type[Any]] = DMCConfig
    config: Any  # as resolved

    def __init__(self, config: DMCConfig | None = None) -> None:
        super().__init__(config)
        self.config = self.config.resolve()

    def setup(self, task: Task) -> None:
        """Create the gates, all open, and their optimiser.

        Raises:
            BudgetError: if the budget is out of reach with these gates; says what is in reach.
        """
        self.place_gates(task)
        if self.config.variant == "paper" and self.config.annealing:
            raise ValueError("dmc: the paper has no annealing; leave it out, or take variant 'annealed'")
        self.inverse_kappa = self.inverse_kappa_in(0)
        self.theta = nn.Parameter(torch.ones(len(self.placement.index), device=task.device))
        self.optimizer = torch.optim.Adam([self.theta], lr=self.config.learning_rate)
        self.step = 0

    def step_on(self, task: Task, inputs: Any, targets: Any) -> Metrics:
        """Take one step of Algorithm 1."""
        with freeze_weights(self.weights):
            gates = self.placement.spread(self.sample(task.seed))
            data_loss = self.data_loss(task, inputs, targets, gates)
            cost = self.cost(task)
            regulariser = log_distance(self.placement.ratio(cost), self.placement.target)
            loss = data_loss + self.config.regularisation * regulariser.float()
            (gradient,) = torch.autograd.grad(loss, [self.theta])
        # Gates and cost term are equal on all ranks; the images differ.
        self.theta.grad = task.distributed.mean_(gradient)
        self.optimizer.step()
        symmetric_decay_(self.theta, self.config.decay)
        with torch.no_grad():
            self.theta.clamp_(0, 1)
        self.step += 1
        return {
            "loss": loss.detach(),
            task.objective.loss_name: data_loss.detach(),
            "regulariser": regulariser.detach(),
            f"{task.budget.resource}_ratio": cost.detach() / self.placement.full,
            "randomness": (self.theta.detach() - 0.5).abs().mean(),  # s of Fig. 5: ½ = decided, 0 = a coin toss
            "open": (self.theta.detach() >= 0.5).float().mean(),
        }

    def sample(self, seed: int) -> Tensor:
        """Draw the gates of the cross-entropy term, [n]."""
        if self.config.sampling == "deterministic" or self.inverse_kappa == 0:
            return deterministic_gate(self.theta)
        if self.inverse_kappa == 1:
            return bernoulli_gate(self.theta, seed=seed, step=self.step)
        with torch.no_grad():
            probability = 0.5 + (self.theta - 0.5) / self.inverse_kappa  # the kernel takes all below 0 for 0
            drawn = bernoulli_gate(probability, seed=seed, step=self.step)
        return straight_through(self.theta, drawn > 0)

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """Let the gates of the next epoch become less random; return the metrics to log."""
        metrics = super().end_epoch(task, epoch)
        self.inverse_kappa = self.inverse_kappa_in(epoch + 1)
        return metrics

    def inverse_kappa_in(self, epoch: int) -> float:
        """Return 1/κ in an epoch, counted from 0: 1 until annealing begins, 0 in the last epoch."""
        return fraction_left(epoch, self.config.epochs, self.config.annealing)

    def proxy_accuracy(self, task: Task) -> Metrics:
        """Measure the held-out accuracy under the deterministic gates, and under a draw of the next step's."""
        if self.config.sampling == "deterministic":
            return super().proxy_accuracy(task)
        with torch.no_grad():
            gates = self.placement.spread(self.sample(task.seed))
            drawn = task.measure(GatedCall(self.masked, gates))
        return {**super().proxy_accuracy(task), f"proxy_{task.objective.measure_name}_of_drawn_gates": drawn}

    def cost(self, task: Task) -> Tensor:
        """Compute the cost of the network under the deterministic gates; differentiable in θ."""
        gates = self.placement.spread(deterministic_gate(self.theta))
        return task.budget.cost(task.graph, gates)

    def gates(self) -> Tensor:
        """Return the deterministic gates, [n]."""
        return deterministic_gate(self.theta)

    def plan(self, task: Task) -> PruningPlan:
        """Keep θ ≥ ½; if that misses the budget, open or close the gates nearest to the threshold.

        Many θ end at exactly 0 or 1. Among equal θ the larger filters (relative to their group) are kept, not the lower
        indices.
        """
        graph = task.graph
        theta = self.placement.spread(self.theta.detach()).cpu()
        norms = normalise_scores(graph, unit_norms(graph, task.model, p=2))
        by_norm = norms.argsort(descending=True, stable=True)
        order = by_norm[theta[by_norm].argsort(descending=True, stable=True)]
        scores = torch.empty(graph.num_units, dtype=torch.float64)
        scores[order] = -torch.arange(graph.num_units, dtype=torch.float64)
        return self.keep_open(task, theta >= 0.5, scores)

    def state_dict(self) -> dict[str, Any]:
        """Return θ, Adam's moments, the step and the randomness of the gates."""
        # Copies: later steps change the tensors that torch returns.
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        theta = self.theta.detach().clone()
        return {"theta": theta, "optimizer": optimizer, "step": self.step, "inverse_kappa": self.inverse_kappa}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state has another number of gates.
        """
        if state["theta"].shape != self.theta.shape:
            raise ValueError(
                f"dmc: the state has {len(state['theta'])} gates, this network has {len(self.theta)}; "
                "resume with the model and the option 'groups' of the first run"
            )
        with torch.no_grad():
            self.theta.copy_(state["theta"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.step, self.inverse_kappa = int(state["step"]), float(state["inverse_kappa"])


def symmetric_decay_(theta: Tensor, amount: float) -> None:
    """Compute θ ← θ − β sign(θ − ½) in place, with sign(0) = 0. Source: Gao et al., CVPR 2020, eq. 12."""
    with torch.no_grad():
        theta.sub_(torch.sign(theta - 0.5), alpha=amount)
