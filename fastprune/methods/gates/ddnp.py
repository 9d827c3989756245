"""Disentangled Differentiable Network Pruning (Gao, Huang, Zhang and Huang, ECCV 2022).

Two small networks learn separately which channels to keep and how many, while the pruned network is frozen. For a
group of C channels g_k gives the keep ratio k, and g_s raw scores s̄; the scores s = σ(s̄) rank the channels. The mask
opens the Ck channels of highest score, with a soft edge of γ channels (eq. 7). One step (Algorithm 1):

    J = cross-entropy(masked network) + λ R(T(k), pT) + ρ C(k, s̄)
    R = log(max(T, pT) / pT)                             the cost of the widths k, 0 within the budget
    C = Σ_l (k_l − mean_i σ(s̄_{l,i} / t))²               widths follow the number of high scores

The mask takes k without its gradient and passes its own gradient straight through to s. So g_s gets the gradients of
the cross-entropy and of C, and g_k those of R and of C: k never sees the data, and s never sees the cost.

With ``variant=paper`` that is all. Redundant channels then slide along the soft edge of the mask, the search converges
to gates between 0 and 1, and rounding them loses what it found. ``variant=perturbed``, the default, ranks the channels
of each step by s̄ + τ G, with G fresh logistic noise, and R = |log(T/pT)| also raises a cost that has fallen below the
budget; plan and evaluation rank without noise. ``variant=release`` computes the terms of the authors' published code,
see ``ddnp_release``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastprune.graph.interior import GROUPS
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Task
from fastprune.methods.gates.ddnp_release import ReleaseTerms
from fastprune.methods.gates.ddnp_terms import GatedGroups, MaskTerms, Terms
from fastprune.methods.gates.gated import GateSearch, freeze_weights
from fastprune.methods.gates.generators import (
    ScoreGenerator,
    WidthGenerator,
    apply_gradients,
    copy_state,
    restore_state,
)
from fastprune.methods.gates.regularisers import SIDES
from fastprune.methods.scores.ranking import ranks
from fastprune.networks.masked import EnergyMeter
from fastprune.ops import topk_mask
from fastprune.options import option, settle
from fastprune.planning.fitting import fit
from fastprune.training.phases import Metrics, Phase


@dataclass(frozen=True)
class DDNPConfig:
    """Options of DDNP; the defaults are the paper's for CIFAR-10 (§5.1), where the variant does not say otherwise."""

    variant: Literal["perturbed", "paper", "release"] = option(
        "perturbed",
        "paper: as in the paper; perturbed: with noise in the scores, a cost term of two sides and twice its weight; "
        "release: as in the authors' published code, with its losses, masks, ranking and optimiser",
    )
    epochs: int = option(200, "passes over the samples", minimum=1)
    samples: int = option(2500, "random training samples to search on; the paper takes 25000 on ImageNet", minimum=1)
    batch_size: int = option(256, "samples per step over all processes together", minimum=1)
    learning_rate: float = option(1e-3, "learning rate of Adam for both generators", minimum=0.0)
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate over the epochs; cosine falls to 0")
    noise: float | None = option(
        None,
        "τ, scale of the logistic noise that a step adds to raw scores; none = that of the variant: 0.3, paper: 0",
        minimum=0.0,
    )
    regularisation: float | None = option(
        None,
        "λ, the weight of the cost term; none = that of the variant: 4, paper: 2; the paper takes 4 on ImageNet",
        minimum=0.0,
    )
    coupling: float | None = option(
        None,
        "ρ, the weight of the term that ties widths to scores; none = that of the variant: 2, release: 1",
        minimum=0.0,
    )
    temperature: float = option(0.4, "t, the temperature of the scores in that term", minimum=1e-3)
    window: float = option(0.1, "γ, the mask's soft edge, as a fraction of the group; 0 = hard masks", minimum=0.0)
    closing: float = option(
        0.0,
        "fraction of the epochs, at the end, over which the soft edge closes, so that the search ends on the network "
        "that it returns; 0 = never, as in the paper",
        minimum=0.0,
        maximum=1.0,
    )
    output: Literal["sigmoid", "abs", "square"] = option("sigmoid", "function from raw scores to scores (§5.4)")
    architecture: Literal["gru", "fc", "channel"] = option(
        "gru", "form of g_s: gru (GRU and linear layers, the paper's), fc (linear layers), channel (one parameter each)"
    )
    score_bias: float = option(
        0.0, "number added to raw scores; variant=release adds the 3 of the authors' release by itself"
    )
    resource: Literal["auto", "one_sided", "two_sided"] = option(
        "auto",
        "cost term: one_sided: log(max(T, pT)/pT), two_sided: |log(T/pT)|, which also raises a cost below pT; auto = "
        "that of the variant: two_sided, paper: one_sided",
    )
    groups: Literal["auto", "interior", "all"] = option("auto", GROUPS)
    augment: bool = option(False, "search on augmented images")
    evaluate_every: int = option(10, "epochs between two held-out accuracies of the current plan; 0 = never", minimum=0)

    def resolve(self) -> DDNPConfig:
        """Return these options with those of the variant where they are None or ``auto``."""
        return settle(self, VARIANTS[self.variant])


NAMES = ("noise", "regularisation", "coupling", "resource")
VARIANTS: dict[str, dict[str, Any]] = {
    "perturbed": dict(zip(NAMES, (0.3, 4.0, 2.0, "two_sided"), strict=True)),
    "paper": dict(zip(NAMES, (0.0, 2.0, 2.0, "one_sided"), strict=True)),
    "release": dict(zip(NAMES[1:], (4.0, 1.0, "two_sided"), strict=True)),
}
"""Options that each variant sets where the user leaves them out; the release has its own noise."""


def make_terms(config: Any, groups: GatedGroups, seed: int) -> Terms:
    """Create the terms of the option ``variant``, from resolved options.

    Raises:
        ValueError: for options that the variant's terms do not have.
    """
    if config.variant != "release":
        if config.variant == "paper" and config.noise:
            raise ValueError("ddnp: the paper has no noise; leave it out, or take variant 'perturbed'")
        if config.noise and config.output != "sigmoid":
            raise ValueError(
                f"ddnp: output {config.output!r} takes no noise; set noise to 0, or output to 'sigmoid', or variant to "
                "'paper'"
            )
        return MaskTerms(
            groups,
            learning_rate=config.learning_rate,
            epochs=config.epochs,
            temperature=config.temperature,
            window=config.window,
            closing=config.closing,
            output=config.output,
            noise=config.noise,
            cosine=config.schedule == "cosine",
            seed=seed,
        )
    for name in ("temperature", "window", "closing", "output", "noise", "schedule"):
        if getattr(config, name) != getattr(DDNPConfig, name):
            raise ValueError(
                f"ddnp: {name} {getattr(config, name)!r} has no effect with variant 'release'; leave it out"
            )
    return ReleaseTerms(
        groups,
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        samples=config.samples,
        batch_size=config.batch_size,
        seed=seed,
    )


class DDNP(GateSearch):
    """Learn separately which channels to keep and how many: two generators, trained on the frozen network.

    The weights do not change. At the end each group keeps its channels of highest score, round(Ck) of them after one
    common shift of all widths that brings their cost onto the budget.
    """

    name = "ddnp"
    paper = "Gao et al., Disentangled Differentiable Network Pruning, ECCV 2022"
    phase = "generators"
    Config: ClassVar[type[Any]] = DDNPConfig
    config: Any  # as resolved

    def __init__(self, config: DDNPConfig | None = None) -> None:
        super().__init__(config)
        self.config = self.config.resolve()

    def setup(self, task: Task) -> None:
        """Create the generators and the terms.

        Raises:
            BudgetError: if the budget is out of reach with these gates; says what is in reach.
            ValueError: for options that the release's terms do not have.
        """
        graph, units = task.graph, self.place_gates(task)
        gated = torch.tensor([g for g, group in enumerate(graph.groups) if bool(units[group.start])])
        sizes = graph.offsets.diff()
        self.full_widths = sizes.double().to(task.device)
        self.gated = gated.to(task.device)  # indices of the gated groups among all
        self.groups = GatedGroups.build(sizes[gated].to(task.device))
        self.terms = make_terms(self.config, self.groups, task.seed)
        divided = self.config.variant != "release"
        self.scores = ScoreGenerator(
            self.groups.sizes.tolist(), self.config.architecture, task.seed, divided=divided
        ).to(task.device)
        self.widths = WidthGenerator(len(gated), task.seed + 1).to(task.device)
        self.parameters = [*self.scores.parameters(), *self.widths.parameters()]
        self.optimizer = self.terms.make_optimizer(self.scores, self.widths)

    def phases(self, task: Task) -> Iterator[Phase]:
        """Yield the phases of the terms, then the training."""

        def energies(inputs: Any, targets: Any) -> Tensor:
            meter = EnergyMeter(self.masked)
            task.objective.run(meter, inputs, targets)
            return task.distributed.mean_(torch.as_tensor(meter.energies))[self.placement.index]

        yield from self.terms.phases(energies)
        yield from super().phases(task)

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """Prepare the next epoch; return the metrics to log."""
        self.terms.end_epoch(self.optimizer, epoch)
        return super().end_epoch(task, epoch)

    def raw_scores(self) -> Tensor:
        """Return s̄ of all gated channels, [n]."""
        raw: Tensor = self.scores()
        return raw + float(self.config.score_bias)

    def keep(self) -> Tensor:
        """Return the widths k of all gated groups, [L]."""
        return torch.sigmoid(self.widths())

    def cost(self, task: Task, widths: Tensor) -> Tensor:
        """Compute the cost of the network with ``widths`` [L] channels in the gated groups; differentiable in them."""
        return task.budget.meter(task.graph).of_widths(self.full_widths.index_copy(0, self.gated, widths.double()))

    def step_on(self, task: Task, inputs: Any, targets: Any) -> Metrics:
        """Take one step of Algorithm 1."""
        config = self.config
        with torch.autocast(task.device.type, enabled=False):  # bfloat16 would round different scores to equal ones
            raw, keep = self.raw_scores(), self.keep()
            mask, widths, coupling = self.terms.step(raw, keep)
        with freeze_weights(self.weights):
            data_loss = self.data_loss(task, inputs, targets, self.placement.spread(mask))
            cost = self.cost(task, widths)
            regulariser = SIDES[config.resource](self.placement.ratio(cost), self.placement.target)
            loss = data_loss + config.regularisation * regulariser.float() + config.coupling * coupling
            gradients = torch.autograd.grad(loss, self.parameters)
        apply_gradients(self.optimizer, self.parameters, gradients, task.distributed)
        return {
            "loss": loss.detach(),
            task.objective.loss_name: data_loss.detach(),
            "regulariser": regulariser.detach(),
            "coupling": coupling.detach(),
            f"{task.budget.resource}_ratio": cost.detach() / self.placement.full,
            "keep": keep.detach().mean(),
        }

    def gates(self) -> Tensor:
        """Return the hard masks of the current widths and scores, [n]."""
        return topk_mask(self.current_scores(), self.keep(), self.groups.offsets)

    def current_scores(self) -> Tensor:
        """Return the scores that rank the channels of each group, [n], without gradients."""
        with torch.no_grad():
            return self.terms.ranking(self.raw_scores())

    def plan(self, task: Task) -> PruningPlan:
        """Keep round(Ck) channels of each group, after one common shift of all widths onto the budget."""
        graph, units = task.graph, self.placement.units()
        flat = torch.zeros(graph.num_units, dtype=torch.float64)
        flat[units] = self.priorities()
        chosen = flat > 0  # δ = 0
        chosen[~units] = True
        for group in graph.groups:
            chosen[group.units] |= ranks(flat[group.units]) == 0
        projected = fit(graph, task.budget, flat, prunable=units, limits=task.limits)
        self.record_projection(task, "widths", chosen, projected)
        return graph.plan(projected)

    def priorities(self) -> Tensor:
        """Rank the channels of all groups together, float64 [n] on the CPU.

        With k = σ(z + δ) channel i of a group's ranking is open if i − ½ < C σ(z + δ), that is, if
        z − logit((i − ½)/C) > −δ. Along this one ranking of all channels ``fit`` finds the shift δ.
        """
        scores, logits = self.current_scores().cpu(), self.widths().detach().cpu().double()
        priority = torch.empty(len(scores), dtype=torch.float64)
        for number, (begin, end) in enumerate(pairwise(self.groups.offsets.tolist())):
            place = (ranks(scores[begin:end]).double() + 0.5) / (end - begin)
            priority[begin:end] = logits[number] - torch.logit(place)
        return priority

    def state_dict(self) -> dict[str, Any]:
        """Return both generators with their inputs, the optimiser's moments, and the state of the terms."""
        return {**copy_state(self.optimizer, scores=self.scores, widths=self.widths), **self.terms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is for other gates.
        """
        restore_state(self.name, state, self.optimizer, scores=self.scores, widths=self.widths)
        self.terms.load_state_dict(state)
