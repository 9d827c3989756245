"""Disentangled Differentiable Network Pruning (Gao, Huang, Zhang and Huang, ECCV 2022).

What is kept and how much of it are learnt apart, by two small networks, while the pruned network is frozen. For a group
of C channels g_k gives the part k that stays and g_s raw scores s̄, of which s = σ(s̄) rank the channels. The mask opens
the Ck channels of highest score, with a soft edge of γ channels (eq. 7). One step (Algorithm 1):

    J = cross-entropy(masked network) + λ R(T(k), pT) + ρ C(k, s̄)
    R = log(max(T, pT) / pT)                             the cost of the widths k, until it is within the budget
    C = Σ_l (k_l − mean_i σ(s̄_{l,i} / t))²               widths follow how many scores are high

The mask is built from k without its gradient and passes its own straight through to s. So g_s gets the gradients of the
cross-entropy and of C, and g_k those of R and of C: k never sees the data, and s never sees the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Task
from fastprune.methods.gates.ddnp_release import Release, cosine
from fastprune.methods.gates.gated import GateSearch, weights_frozen
from fastprune.methods.gates.generators import ScoreGenerator, WidthGenerator, follow, restore, state_of
from fastprune.methods.gates.regularisers import SIDES
from fastprune.methods.scores.ranking import rank_of
from fastprune.ops import topk_mask
from fastprune.options import option
from fastprune.planning.fitting import fit
from fastprune.training.phases import Metrics, Phase

OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "abs": torch.abs, "square": torch.square}


@dataclass(frozen=True)
class DDNPConfig:
    """Options of DDNP; the defaults are the paper's for CIFAR-10 (§5.1)."""

    variant: Literal["paper", "release"] = option(
        "paper",
        "the paper's losses, or what the authors' published code computes (its own masks, ranking and optimiser)",
    )
    epochs: int = option(200, "passes over the samples", minimum=1)
    samples: int = option(2500, "random training samples to search on; the paper takes 25000 on ImageNet", minimum=1)
    batch_size: int = option(256, "samples per step over all processes together", minimum=1)
    learning_rate: float = option(1e-3, "Adam's learning rate, constant, for both generators", minimum=0.0)
    regularisation: float = option(2.0, "λ, the weight of the cost term; the paper takes 4 on ImageNet", minimum=0.0)
    coupling: float = option(2.0, "ρ, the weight of the term that lets widths follow scores", minimum=0.0)
    temperature: float = option(0.4, "t of the scores in the coupling term", minimum=1e-3)
    window: float = option(0.1, "γ, the mask's soft edge, as a part of a group's channels; 0 = hard masks", minimum=0.0)
    closing: float = option(
        0.0,
        "part of the epochs, at the end, over which the soft edge closes, so that the search ends on the network that "
        "it returns; 0 = it stays, as in the paper",
        minimum=0.0,
        maximum=1.0,
    )
    output: Literal["sigmoid", "abs", "square"] = option("sigmoid", "function that turns raw scores into scores (§5.4)")
    architecture: Literal["gru", "fc", "channel"] = option(
        "gru",
        "g_s: gru (GRU and linear layers, the paper's), fc (linear layers), channel (one parameter each)",
    )
    score_bias: float = option(
        0.0, "added to raw scores; the authors' release has 3, which variant=release adds by itself"
    )
    resource: Literal["one_sided", "two_sided"] = option(
        "one_sided", "the cost term: log(max(T, pT)/pT) as in the paper, or |log(T/pT)|, which also pulls upwards"
    )
    groups: Literal["interior", "all"] = option(
        "interior", "gates inside blocks only, as in the paper, or on every channel that can go"
    )
    augment: bool = option(False, "search on augmented images")
    evaluate_every: int = option(10, "epochs between two held-out accuracies of the current plan; 0 = never", minimum=0)


def refuse_unused(config: DDNPConfig) -> None:
    """Refuse options of the paper's terms that ``variant=release`` would silently pass over."""
    for name in ("temperature", "window", "closing", "output"):
        if getattr(config, name) != getattr(DDNPConfig, name):
            raise ValueError(
                f"ddnp: {name} {getattr(config, name)!r} means nothing with variant 'release'; leave it out"
            )


class DDNP(GateSearch):
    """Learn which channels to keep apart from how many: two generators, trained on the frozen network.

    The weights stay as they are. In the end each group keeps its channels of highest score, round(Ck) of them after one
    common shift of all widths that takes their cost onto the budget.
    """

    name = "ddnp"
    paper = "Gao et al., Disentangled Differentiable Network Pruning, ECCV 2022"
    phase = "generators"
    Config: ClassVar[type[Any]] = DDNPConfig
    config: DDNPConfig

    def setup(self, task: Task) -> None:
        """Make the generators.

        Raises:
            BudgetError: if the budget is out of reach with these gates; says what is in reach.
            ValueError: for options that the release's computation does not have.
        """
        if self.config.variant == "release":
            refuse_unused(self.config)
        graph, may_go = task.graph, self.place_gates(task)
        self.gated = torch.tensor([g for g, group in enumerate(graph.groups) if bool(may_go[group.start])])
        sizes = graph.offsets.diff()
        self.sizes = sizes[self.gated].to(task.device)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[self.gated].cumsum(0)]).to(task.device)
        self.owner = torch.repeat_interleave(torch.arange(len(self.gated), device=task.device), self.sizes)
        self.full_widths = sizes.double().to(task.device)
        self.gated = self.gated.to(task.device)
        self.windows = (self.config.window * self.sizes).round()
        self.edge = self.edge_in(0)  # what is left of the windows
        self.scores = ScoreGenerator(self.sizes.tolist(), self.config.architecture, task.seed).to(task.device)
        self.widths = WidthGenerator(len(self.gated), task.seed + 1).to(task.device)
        self.parameters = [*self.scores.parameters(), *self.widths.parameters()]
        self.release: Release | None = None
        # Fused: 1.1 ms a step instead of 2.8 for ResNet-56's gates, on one core; 2.4 instead of 8.4 for ResNet-50's.
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            self.parameters, lr=self.config.learning_rate, fused=True
        )
        if self.config.variant == "release":
            self.release = Release(self.sizes, self.offsets, self.owner, task.seed)
            self.optimizer = self.release.optimizer(self.scores, self.widths, self.config.learning_rate)

    def phases(self, task: Task) -> Iterator[Phase]:
        """The training; the release's ranking measures the channels' features before."""
        release, config = self.release, self.config
        if release is not None:

            def measure(images: Tensor, labels: Tensor) -> Metrics:
                energy = task.distributed.mean_(self.masked.energies(images))
                release.collect(energy[self.placement.index])
                return {}

            yield Phase("features", 1, measure, config.samples, config.batch_size)
        yield from super().phases(task)

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """What the search logs; windows may close, and the release lowers the widths' learning rate."""
        self.edge = self.edge_in(epoch + 1)
        if self.release is not None:
            self.optimizer.param_groups[1]["lr"] = cosine(self.config.learning_rate, epoch + 1, self.config.epochs)
        return super().end_epoch(task, epoch)

    def edge_in(self, epoch: int) -> float:
        """The part of the windows that is left in an epoch, counted from 0; none in the last one if they close."""
        if not self.config.closing:
            return 1.0
        return min(1.0, max(0, self.config.epochs - 1 - epoch) / (self.config.closing * self.config.epochs))

    def raw_scores(self) -> Tensor:
        """s̄ of every gate's channels, [n]."""
        raw: Tensor = self.scores()
        return raw + self.config.score_bias

    def keep(self) -> Tensor:
        """The widths k of all gates, [L]."""
        return torch.sigmoid(self.widths())

    def mask(self, raw: Tensor, keep: Tensor) -> Tensor:
        """Soft top-k masks [n] of all gates (eq. 7), with the gradient straight through to the scores."""
        scores = OUTPUTS[self.config.output](raw)
        return topk_mask(scores, keep.detach(), self.offsets, self.edge * self.windows.to(scores.dtype))

    def coupling(self, raw: Tensor, keep: Tensor) -> Tensor:
        """C of eq. 5: squared distances of widths from the mean of sharpened scores, summed over the gates."""
        sharpened = torch.sigmoid(raw / self.config.temperature)
        sums = torch.zeros_like(keep).index_add(0, self.owner, sharpened)
        distance: Tensor = keep - sums / self.sizes
        return distance.square().sum()

    def cost(self, task: Task, widths: Tensor) -> Tensor:
        """The cost of the whole network with ``widths`` [L] channels behind the gates; differentiable in them."""
        return task.budget.meter(task.graph).of_widths(self.full_widths.index_copy(0, self.gated, widths.double()))

    def step_on(self, task: Task, images: Tensor, labels: Tensor) -> Metrics:
        """One iteration of Algorithm 1."""
        config = self.config
        with torch.autocast(task.device.type, enabled=False):  # bfloat16 would make scores equal that are not
            raw, keep = self.raw_scores(), self.keep()
            if self.release is None:
                mask, widths, coupling = self.mask(raw, keep), self.sizes * keep, self.coupling(raw, keep)
            else:
                mask, hard = self.release.masks(raw, keep)
                widths, coupling = self.release.widths(hard, keep), self.release.pursuit(hard, keep)
        with weights_frozen(self.weights):
            outputs = self.masked(images, self.placement.spread(mask))
            cross_entropy = F.cross_entropy(outputs.float(), labels)
            cost = self.cost(task, widths)
            regulariser = SIDES[config.resource](self.placement.ratio(cost), self.placement.target)
            loss = cross_entropy + config.regularisation * regulariser.float() + config.coupling * coupling
            gradients = torch.autograd.grad(loss, self.parameters)
        follow(self.optimizer, self.parameters, gradients, task.distributed)
        return {
            "loss": loss.detach(),
            "cross_entropy": cross_entropy.detach(),
            "regulariser": regulariser.detach(),
            "coupling": coupling.detach(),
            f"{task.budget.resource}_ratio": cost.detach() / self.placement.full,
            "keep": keep.detach().mean(),
        }

    def gates(self) -> Tensor:
        """Hard masks of the widths and scores that there are now, [n]."""
        return topk_mask(self.scores_now(), self.keep(), self.offsets)

    def scores_now(self) -> Tensor:
        """What ranks all gates' channels, [n], without gradients: the scores s, or the release's ranking."""
        if self.release is not None:
            return self.release.ranking
        with torch.no_grad():
            return OUTPUTS[self.config.output](self.raw_scores())

    def plan(self, task: Task) -> PruningPlan:
        """Keep round(Ck) channels of each group, all widths shifted alike onto the budget.

        With k = σ(z + δ) channel i of a group's ranking is open if i − ½ < C σ(z + δ), that is, if
        z − logit((i − ½)/C) > −δ: one ranking of all channels, along which ``fit`` finds the shift δ.
        """
        graph, budget = task.graph, task.budget
        may_go = self.placement.may_go()
        scores, logits = self.scores_now().cpu(), self.widths().detach().cpu().double()
        priority = torch.empty(len(scores), dtype=torch.float64)
        bounds = self.offsets.tolist()
        for number, (begin, end) in enumerate(pairwise(bounds)):
            place = (rank_of(scores[begin:end]).double() + 0.5) / (end - begin)
            priority[begin:end] = logits[number] - torch.logit(place)
        flat = torch.zeros(graph.num_units, dtype=torch.float64)
        flat[may_go] = priority
        chosen = flat > 0  # δ = 0
        chosen[~may_go] = True
        for group in graph.groups:
            chosen[group.units] |= rank_of(flat[group.units]) == 0
        projected = fit(graph, budget, flat, prunable=may_go, limits=task.limits)
        self.note_projection(task, "widths", chosen, projected)
        return graph.plan(projected)

    def state_dict(self) -> dict[str, Any]:
        """Both generators with their inputs, Adam's moments, the windows' part, and the release's ranking."""
        state = {**state_of(self.optimizer, scores=self.scores, widths=self.widths), "edge": self.edge}
        return state if self.release is None else {**state, "release": self.release.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is for other gates.
        """
        restore(self.name, state, self.optimizer, scores=self.scores, widths=self.widths)
        self.edge = float(state["edge"])
        if self.release is not None:
            self.release.load_state_dict(state["release"])
