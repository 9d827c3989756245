"""Global channel pruning (GCP, "PruneNet"; Khetan and Karnin, 2020): ℓ1 on scales with batch norm off, in rounds.

The weights of convolutions do not change. Each round has two epochs on the scales γ and shifts β of batch norms and on
the linear layers θ:

    sparsify    min CE + λ Σ c_l s_k |γ_k|      global statistics (batch norm "off"), by proximal gradient steps (eq. 6)
                all channels compete by s_k |γ_k|; the lowest are closed until the round's cost is met
    recover     min CE                          batch statistics, new global ones; closed channels stay closed (eq. 7)

s_k = ‖W_{·k}‖ is the norm of the weights that read the channel. c_l is the cost of one channel of the layer, on both
sides, computed in each round and divided by its mean. Its unit is that of the budget: FLOPs (the paper's GCP-f),
parameters (GCP-p), or milliseconds (GCP-ℓ). Channels of a residual stream share a mask, see ``scales``. With batch norm
on, the penalty would have no effect: the next layer's statistics make up for a smaller γ.

Steps are taken in the coordinates of the paper, where W_{·k} is scaled to the same norm for all k, and γ_k, β_k by s_k:
a rate of η/s_k² and a threshold of ηλc/s_k on γ_k itself, with s_k relative to the median.

Each round chooses the λ and the learning rate with the least held-out loss after the recovery.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastprune.graph.interior import GROUPS, gated_units
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Method, Task
from fastprune.methods.gates.gated import freeze_weights
from fastprune.methods.gates.generators import apply_gradients
from fastprune.methods.gcp.closable import find_closable_units
from fastprune.methods.gcp.folding import fold_constants
from fastprune.methods.gcp.scales import Scales
from fastprune.methods.gcp.tensors import ModelTensors
from fastprune.networks.masked import MaskedNetwork
from fastprune.options import check, option
from fastprune.planning.fitting import fit
from fastprune.training.phases import Metrics, Phase, Step

log = logging.getLogger(__name__)

LATENCY_STEP = 8  # channels; latencies are measured at multiples of 8


@dataclass(frozen=True)
class GCPConfig:
    """Options of GCP. The paper gives neither rounds nor learning rates; the defaults are ours."""

    rounds: int = option(5, "T, the number of rounds", minimum=1)
    epochs: int = option(1, "passes over the samples in each half of a round", minimum=1)
    samples: int | None = option(None, "random training samples; none = all", minimum=1)
    batch_size: int = option(128, "samples per step over all processes together", minimum=1)
    augment: bool = option(True, "apply the data set's training augmentation")
    penalties: tuple[float, ...] = option(
        (0.03, 0.1, 0.3),
        "λ to try, as fractions of the λ that shrinks the median channel to zero in half a round",
        minimum=0.0,
    )
    learning_rates: tuple[float, ...] = option((0.01,), "learning rates of SGD to try with each λ", minimum=0.0)
    momentum: float = option(0.9, "momentum of SGD", minimum=0.0, maximum=0.999)
    weight_decay: float = option(
        1e-4, "weight decay of the linear layers; without it they would grow as the penalty shrinks γ", minimum=0.0
    )
    slices: Literal["equal", "geometric"] = option("equal", "the cost falls by equal amounts or factors per round")
    fold_bias: bool = option(True, "fold the constants act(β) of closed channels into the next layers")
    groups: Literal["all", "interior", "auto"] = option("all", GROUPS)

    def __post_init__(self) -> None:
        check(self)
        for name in ("penalties", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}: give at least one value")


@dataclass(frozen=True)
class Candidate:
    """A pair to try in a round: λ as a fraction of the automatic one, and the learning rate."""

    penalty: float
    lr: float


class GCP(Method):
    """Rank all channels of a network together by scales that train under a sparsity penalty."""

    name = "gcp"
    paper = "Khetan and Karnin, PruneNet: Channel Pruning via Global Importance, 2020"
    needs_data = True
    trains_weights = True
    Config: ClassVar[type[Any]] = GCPConfig
    config: GCPConfig

    def setup(self, task: Task) -> None:
        """Find the channels that scales can close, and begin the first round.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
            ValueError: if no batch norm closes channels, or nothing is held out to compare several candidates on.
        """
        assert task.data is not None
        config = self.config
        self.candidates = [Candidate(*pair) for pair in product(config.penalties, config.learning_rates)]
        if len(self.candidates) > 1 and not task.data.held_out:
            raise ValueError(
                f"gcp: {len(self.candidates)} candidates of λ and learning rate are compared on held-out samples, but "
                "nothing is held out; hold some out, or give one value each in penalties and learning_rates"
            )
        self.masked = MaskedNetwork(task.graph, task.model)
        closable = find_closable_units(task.graph, task.model, self.masked)
        self.prunable_units = gated_units(task.graph, config.groups) & closable
        if not bool(self.prunable_units.any()):
            raise ValueError("gcp: no scale of a batch norm closes a prunable channel; choose another method")
        task.require_feasible(self.prunable_units)
        self.scales = Scales(task.graph, task.model, self.prunable_units)
        self.tensors = ModelTensors(task.model)
        self.steps_per_half = config.epochs * task.data.steps(config.batch_size, config.samples)
        self.round = self.candidate = 0
        self.best: dict[str, Any] = {}
        self.start = self.snapshot()
        self.begin_candidate(task)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train: γ, β, m, θ."""
        return [self.scales.gamma, self.scales.beta, self.scales.mask, *self.tensors.linear]

    def begin_candidate(self, task: Task) -> None:
        """Prepare the round of a candidate: costs, thresholds, and an optimiser with fresh momentum."""
        config, chosen, linear = self.config, self.candidates[self.candidate], self.tensors.linear
        self.optimizer = torch.optim.SGD(
            [
                {"params": self.parameters[:3], "weight_decay": 0.0},
                *([{"params": linear, "weight_decay": config.weight_decay}] if linear else []),
            ],
            lr=chosen.lr,
            momentum=config.momentum,
        )
        kept = self.scales.open.cpu() | ~self.prunable_units
        weight = costs(task, kept, self.prunable_units).to(self.scales.gamma)
        importance = self.scales.importance()
        median = importance[self.scales.open & (importance > 0)].median().nan_to_num(1.0)
        self.unit = torch.where(importance > 0, importance / median, 1.0)
        self.reach = torch.where(weight > 0, self.scales.magnitudes() * self.unit / weight, 0.0)
        reached = self.reach[self.scales.open & (weight > 0)]
        shrinking = chosen.lr * self.steps_per_half
        self.penalty = chosen.penalty * float(reached.median()) / shrinking if len(reached) and shrinking else 0.0
        self.threshold = chosen.lr * self.penalty * weight / self.unit

    def phases(self, task: Task) -> Iterator[Phase]:
        """Yield two phases for each round and candidate: sparsify and recover."""
        config = self.config
        for _ in range(config.rounds * len(self.candidates)):
            for name, end in (("sparsify", self.end_sparsify), ("recover", self.end_recover)):
                yield Phase(
                    name,
                    config.epochs,
                    self.make_step(task, sparsify=name == "sparsify"),
                    samples=config.samples,
                    batch_size=config.batch_size,
                    augment=config.augment,
                    end_epoch=self.make_end_epoch(task, end),
                )

    def make_step(self, task: Task, *, sparsify: bool) -> Step:
        """Return the step of a phase."""

        def step(inputs: Any, targets: Any) -> Metrics:
            if task.model.training == sparsify:  # batch norm off to sparsify, on to recover
                task.model.train(not sparsify)
            metrics = self.train_step(task, inputs, targets)
            if sparsify:
                self.scales.shrink_(self.threshold)
            else:
                self.tensors.share_statistics(task.distributed)  # after every step: rank 0 saves those of all
            return metrics

        return step

    def make_end_epoch(self, task: Task, end: Callable[[Task], Metrics]) -> Callable[[int], Metrics]:
        """Return the hook of a phase after its epochs: ``end`` after the last one."""
        return lambda epoch: end(task) if epoch + 1 == self.config.epochs else {}

    def train_step(self, task: Task, inputs: Any, targets: Any) -> Metrics:
        """Take one step on γ, β, m and θ."""
        parameters = self.parameters
        with freeze_weights(self.tensors.frozen):
            values = self.scales.effective()

            def network(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(task.model, values, args, kwargs)

            loss, metrics = task.objective.measure(*task.objective.run(network, inputs, targets))
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        gradients = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs]
        rates = self.scales.rates(self.unit)
        gradients[:3] = [gradient * rate for gradient, rate in zip(gradients, rates, strict=False)]
        apply_gradients(self.optimizer, parameters, gradients, task.distributed)
        # The engine stops a run when a metric named "…loss" diverges; one of several candidates may diverge and loses.
        name = "loss" if len(self.candidates) == 1 else "cross_entropy" if task.objective.classifies else "objective"
        return {name: loss.detach(), **metrics}

    @torch.no_grad()
    def end_sparsify(self, task: Task) -> Metrics:
        """Close the channels of lowest score until the round's cost is met."""
        scales, graph = self.scales, task.graph
        magnitudes = scales.magnitudes()
        zero = float((magnitudes[scales.open & self.prunable_units.to(scales.open.device)] == 0).float().mean())
        before = scales.open.cpu()
        budget = task.budget
        if self.round + 1 < self.config.rounds:
            budget = replace(budget, value=self.round_limit(task), absolute=True)
        scores = (magnitudes * scales.importance()).cpu().double().nan_to_num()  # NaN after divergence
        # Scores of exactly zero are ranked by the λ that brings them to zero.
        scores = torch.where(scores > 0, scores, -1 / (1 + self.reach.cpu().double()))
        kept = fit(graph, budget, scores, prunable=self.prunable_units, gone=~before, limits=task.limits)
        closing = before & ~kept
        folded = {}
        if self.config.fold_bias:
            self.silence(closing)
            scales.write()
            folded["folded"] = fold_constants(graph, task.model, self.masked.network, closing)
        scales.open &= kept.to(scales.open.device)
        scales.write()
        self.optimizer.state.clear()
        cost = float(task.budget.cost(graph, kept | ~self.prunable_units)) / float(task.budget.cost(graph))
        return {"zero_channels": zero, f"{task.budget.resource}_ratio": cost, "penalty": self.penalty, **folded}

    def silence(self, units: Tensor) -> None:
        """Set γ of units to 0 and keep their β, which makes them constants."""
        padded = torch.cat([units, torch.zeros(1, dtype=torch.bool)]).to(self.scales.owner.device)
        self.scales.gamma.data.masked_fill_(padded[self.scales.owner], 0.0)

    def round_limit(self, task: Task) -> float:
        """Return the largest cost after this round, in MACs, parameters or milliseconds."""
        full, limit = float(task.budget.cost(task.graph)), task.budget.limit(task.graph)
        part = (self.round + 1) / self.config.rounds
        if self.config.slices == "geometric":
            return float(full * (limit / full) ** part)
        return full - part * (full - limit)

    @torch.no_grad()
    def end_recover(self, task: Task) -> Metrics:
        """Compare the candidate with the best one; begin the next candidate, or the next round from the best."""
        self.scales.write()
        metrics: dict[str, float] = {"round": float(self.round + 1)}
        loss = 0.0
        if len(self.candidates) > 1:
            assert task.data is not None
            loss = metrics["held_out_loss"] = task.data.loss(task.model)
            loss = loss if math.isfinite(loss) else math.inf
        if not self.best or loss < self.best["loss"]:
            self.best = {"loss": loss, "candidate": self.candidate, "snapshot": self.snapshot()}
        self.candidate += 1
        if self.candidate < len(self.candidates):
            self.restore(self.start)
        elif self.best["loss"] == math.inf:
            raise ValueError(
                f"gcp: round {self.round + 1} diverged with every candidate; give smaller learning_rates than "
                f"{list(self.config.learning_rates)}"
            )
        else:
            best = self.candidates[self.best["candidate"]]
            log.info("round %d: λ × %g, learning rate %g", self.round + 1, best.penalty, best.lr)
            metrics |= {"best_penalty": best.penalty, "best_lr": best.lr}
            self.restore(self.best["snapshot"])
            self.start, self.best, self.candidate = self.best["snapshot"], {}, 0
            self.round += 1
        self.scales.write()
        self.begin_candidate(task)
        return metrics

    def snapshot(self) -> dict[str, Any]:
        """Copy all values that a candidate changes."""
        return {"scales": self.scales.state_dict(), "tensors": self.tensors.copy()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Restore a snapshot."""
        self.scales.load_state_dict(snapshot["scales"])
        self.tensors.restore(snapshot["tensors"])

    def plan(self, task: Task) -> PruningPlan:
        """Keep the channels that are open after the last round."""
        self.scales.write()
        task.model.eval()
        return task.graph.plan(self.scales.open.cpu() | ~self.prunable_units)

    def state_dict(self) -> dict[str, Any]:
        """Return scales, optimiser, and the progress of the rounds."""
        return {
            "scales": self.scales.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "round": self.round,
            "candidate": self.candidate,
            "start": self.start,
            "best": self.best,
            "penalty": self.penalty,
            "threshold": self.threshold.clone(),
            "reach": self.reach.clone(),
            "unit": self.unit.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is for another network.
        """
        self.scales.load_state_dict(state["scales"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.round, self.candidate = int(state["round"]), int(state["candidate"])
        self.start, self.best = dict(state["start"]), dict(state["best"])
        self.penalty = float(state["penalty"])
        saved = (state[name].to(self.threshold) for name in ("threshold", "reach", "unit"))
        self.threshold, self.reach, self.unit = saved


def costs(task: Task, kept: Tensor, prunable: Tensor) -> Tensor:
    """Compute the cost of one more channel for each unit: the c of eqs. 5 and 6.

    It is the cost of the current network minus that with one channel less in the unit's group, so it counts the layers
    that make the channel and those that read it. Latencies are differences over 8 channels.

    Args:
        task: the task with graph and budget, whose resource is counted.
        kept: the units of the current network, bool [U].
        prunable: the prunable units, bool [U].

    Returns:
        float64 [U], at least 0, with mean 1 over the kept prunable units; 0 for the others.
    """
    graph, meter = task.graph, task.budget.meter(task.graph)
    groups = graph.group_of_unit
    widths = torch.zeros(len(graph.groups), dtype=torch.float64).index_add(0, groups, kept.double())
    step = torch.full_like(widths, 1 if task.budget.grows else LATENCY_STEP).minimum(widths)
    less = meter.of_widths(widths - step.diag())
    each = ((meter.of_widths(widths) - less) / step.clamp(min=1)).clamp(min=0)
    counted = kept & prunable
    unit_costs = torch.where(counted, each[groups], 0.0)
    mean = unit_costs.sum() / counted.sum().clamp(min=1)
    return unit_costs / mean if mean > 0 else unit_costs
