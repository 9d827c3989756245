"""Global channel pruning (GCP, "PruneNet"; Khetan and Karnin, 2020): ℓ1 on scales with batch norm off, in rounds.

The convolutions' weights stay as they are. Each round has two epochs on the scales γ and shifts β of batch norms and on
the linear layers θ:

    sparsify    min CE + λ Σ c_l s_k |γ_k|      global statistics (batch norm "off"), by proximal gradient steps (eq. 6)
                all channels compete by s_k |γ_k|; the least go until the round's cost is met
    recover     min CE                          batch statistics, new global ones; what is closed stays closed (eq. 7)

s_k = ‖W_{·k}‖ is the norm of what reads the channel, c_l the cost of one channel of the layer, on both sides, found
anew each round and divided by its mean. Its unit is that of the budget: FLOPs (the paper's GCP-f), parameters (GCP-p),
or milliseconds (GCP-ℓ). Channels of a residual stream share a mask, see ``scales``. With batch norm on, the penalty
would mean nothing: a smaller γ is made up for by the next layer's statistics.

Steps are taken in the coordinates of the paper, where W_{·k} is scaled to the same norm for all k, and γ_k, β_k by s_k:
a rate of η/s_k² and a threshold of ηλc/s_k on γ_k itself, with s_k relative to the median.

λ and the learning rate are those of the least held-out loss after the recovery, found anew each round.
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

from fastprune.graph import ChannelGraph
from fastprune.graph.interior import gated_units
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Method, Task
from fastprune.methods.gates.gated import weights_frozen
from fastprune.methods.gates.generators import follow
from fastprune.methods.gcp.folding import fold_constants, probes
from fastprune.methods.gcp.scales import Scales
from fastprune.methods.scores.filters import unit_batch_norms
from fastprune.networks.masked import MaskedNetwork
from fastprune.options import check, option
from fastprune.planning.fitting import fit
from fastprune.training.phases import Metrics, Phase
from fastprune.training.weight_training import classification_loss

log = logging.getLogger(__name__)

LATENCY_STEP = 8  # channels: a latency is measured on multiples of 8


@dataclass(frozen=True)
class GCPConfig:
    """Options of GCP. The paper names neither rounds nor learning rates; the defaults are ours."""

    rounds: int = option(5, "T, the number of rounds in which channels go", minimum=1)
    epochs: int = option(1, "passes over the samples in each half of a round", minimum=1)
    samples: int | None = option(None, "random training samples to use; none = all", minimum=1)
    batch_size: int = option(128, "samples per step over all processes together", minimum=1)
    augment: bool = option(True, "apply the data set's training augmentation")
    penalties: tuple[float, ...] = option(
        (0.03, 0.1, 0.3),
        "values of λ to try, as parts of the λ that carries the median channel to zero in one half of a round",
        minimum=0.0,
    )
    learning_rates: tuple[float, ...] = option((0.01,), "learning rates of SGD to try with each λ", minimum=0.0)
    momentum: float = option(0.9, "momentum of SGD", minimum=0.0, maximum=0.999)
    weight_decay: float = option(
        1e-4, "weight decay of the linear layers; without it they grow by what the penalty takes from γ", minimum=0.0
    )
    slices: Literal["equal", "geometric"] = option("equal", "how the cost falls over the rounds")
    fold_bias: bool = option(True, "fold the constants act(β) of closed channels into what follows")
    groups: Literal["all", "interior"] = option(
        "all", "which channels may go: all, as in the paper, or only those inside blocks"
    )

    def __post_init__(self) -> None:
        check(self)
        for name in ("penalties", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}: at least one value is needed")


@dataclass(frozen=True)
class Candidate:
    """What is tried in a round: λ as a part of the automatic one, and the learning rate."""

    penalty: float
    lr: float


class GCP(Method):
    """Rank all channels of a network together by scales that were trained to be few."""

    name = "gcp"
    paper = "Khetan and Karnin, PruneNet: Channel Pruning via Global Importance, 2020"
    needs_data = True
    trains_weights = True
    Config: ClassVar[type[Any]] = GCPConfig
    config: GCPConfig

    def setup(self, task: Task) -> None:
        """Find out what can be pruned by its scales, and begin the first round.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
            ValueError: for a network without batch norms that close channels, or nothing held out to compare
                candidates on.
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
        self.may_go = gated_units(task.graph, config.groups) & closed_by_scales(task.graph, task.model, self.masked)
        if not bool(self.may_go.any()):
            raise ValueError("gcp: no prunable channel is closed by the scale of a batch norm; choose another method")
        fit(task.graph, task.budget, torch.zeros(task.graph.num_units), prunable=self.may_go, limits=task.limits)
        self.scales = Scales(task.graph, task.model, self.may_go)
        self.linear = [
            parameter
            for module in task.model.modules()
            if isinstance(module, nn.Linear)
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        ]
        self.statistics = [
            buffer
            for norm in task.model.modules()
            if isinstance(norm, nn.modules.batchnorm._BatchNorm)
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None
        ]
        trained = {id(parameter) for parameter in self.linear}
        self.others = [parameter for parameter in task.model.parameters() if id(parameter) not in trained]
        self.shifts = [  # folding may write to them
            parameter
            for name, parameter in task.model.named_parameters()
            if name.endswith("bias") and id(parameter) not in trained
        ]
        self.steps_per_half = config.epochs * task.data.steps(config.batch_size, config.samples)
        self.round = self.candidate = 0
        self.best: dict[str, Any] = {}
        self.start = self.snapshot()
        self.begin(task)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained: γ, β, m, θ."""
        return [self.scales.gamma, self.scales.beta, self.scales.mask, *self.linear]

    def begin(self, task: Task) -> None:
        """Prepare a candidate's half round: costs, thresholds, an optimiser without momentum."""
        config, chosen = self.config, self.candidates[self.candidate]
        self.optimizer = torch.optim.SGD(
            [
                {"params": self.parameters[:3], "weight_decay": 0.0},
                *([{"params": self.linear, "weight_decay": config.weight_decay}] if self.linear else []),
            ],
            lr=chosen.lr,
            momentum=config.momentum,
        )
        kept = self.scales.open.cpu() | ~self.may_go
        weight = costs(task, kept, self.may_go).to(self.scales.gamma)
        importance = self.scales.importance()
        usual = importance[self.scales.open & (importance > 0)].median().nan_to_num(1.0)
        self.unit = torch.where(importance > 0, importance / usual, 1.0)
        self.reach = torch.where(weight > 0, self.scales.magnitudes() * self.unit / weight, 0.0)
        reached = self.reach[self.scales.open & (weight > 0)]
        shrinking = chosen.lr * self.steps_per_half
        self.penalty = chosen.penalty * float(reached.median()) / shrinking if len(reached) and shrinking else 0.0
        self.threshold = chosen.lr * self.penalty * weight / self.unit

    def phases(self, task: Task) -> Iterator[Phase]:
        """For each round and candidate: sparsify, recover."""
        config = self.config
        for _ in range(config.rounds * len(self.candidates)):
            for name, end in (("sparsify", self.end_sparsify), ("recover", self.end_recover)):
                yield Phase(
                    name,
                    config.epochs,
                    self.stepping(task, sparsify=name == "sparsify"),
                    samples=config.samples,
                    batch_size=config.batch_size,
                    augment=config.augment,
                    end_epoch=self.ending(task, end),
                )

    def stepping(self, task: Task, *, sparsify: bool) -> Callable[[Tensor, Tensor], Metrics]:
        """The step of a phase."""

        def step(images: Tensor, labels: Tensor) -> Metrics:
            if task.model.training == sparsify:  # batch norm off to sparsify, on to recover
                task.model.train(not sparsify)
            metrics = self.train_step(task, images, labels)
            if sparsify:
                self.scales.shrink_(self.threshold)
            else:
                self.share_statistics(task)
            return metrics

        return step

    def ending(self, task: Task, end: Callable[[Task], Metrics]) -> Callable[[int], Metrics]:
        """What happens after a phase's epochs: ``end`` after the last one."""
        return lambda epoch: end(task) if epoch + 1 == self.config.epochs else {}

    def train_step(self, task: Task, images: Tensor, labels: Tensor) -> Metrics:
        """One step on γ, β, m and θ."""
        parameters = self.parameters
        with weights_frozen(self.others):
            outputs = torch.func.functional_call(task.model, self.scales.effective(), (images,))
            loss, scores = classification_loss(outputs, labels)
            with torch.autocast(images.device.type, enabled=False):
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        gradients = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs]
        rates = self.scales.rates(self.unit)
        gradients[:3] = [gradient * rate for gradient, rate in zip(gradients, rates, strict=False)]
        follow(self.optimizer, parameters, gradients, task.distributed)
        # One of several candidates may diverge, and loses; that of a single one stops the run by its name.
        name = "loss" if len(self.candidates) == 1 else "cross_entropy"
        return {name: loss.detach(), "accuracy": (scores.argmax(1) == labels).float().mean()}

    @torch.no_grad()
    def share_statistics(self, task: Task) -> None:
        """Give all processes the mean of their statistics, as each saw its own samples; after every step, so that what
        rank 0 saves is everybody's.
        """
        if task.distributed.world_size > 1 and self.statistics:
            flat = task.distributed.mean_(torch.cat([buffer.float() for buffer in self.statistics]))
            for buffer, part in zip(self.statistics, flat.split([len(b) for b in self.statistics]), strict=True):
                buffer.copy_(part)

    @torch.no_grad()
    def end_sparsify(self, task: Task) -> Metrics:
        """Close the channels of least score, as many as the round's cost asks for."""
        scales, graph = self.scales, task.graph
        magnitudes = scales.magnitudes()
        zero = float((magnitudes[scales.open & self.may_go.to(scales.open.device)] == 0).float().mean())
        before = scales.open.cpu()
        budget = task.budget
        if self.round + 1 < self.config.rounds:
            budget = replace(budget, value=self.limit_of_round(task), absolute=True)
        scores = (magnitudes * scales.importance()).cpu().double().nan_to_num()  # of a candidate that has diverged
        # Scores of exactly zero are ordered by the λ that would have taken them there.
        scores = torch.where(scores > 0, scores, -1 / (1 + self.reach.cpu().double()))
        kept = fit(graph, budget, scores, prunable=self.may_go, gone=~before, limits=task.limits)
        closing = before & ~kept
        folded = {}
        if self.config.fold_bias:
            self.silence(closing)
            scales.write()
            folded["folded"] = fold_constants(graph, task.model, self.masked.network, closing)
        scales.open &= kept.to(scales.open.device)
        scales.write()
        self.optimizer.state.clear()
        cost = float(task.budget.cost(graph, kept | ~self.may_go)) / float(task.budget.cost(graph))
        return {"zero_channels": zero, f"{task.budget.resource}_ratio": cost, "penalty": self.penalty, **folded}

    def silence(self, units: Tensor) -> None:
        """Set γ of units to 0 and leave their β: they are constants then."""
        padded = torch.cat([units, torch.zeros(1, dtype=torch.bool)]).to(self.scales.owner.device)
        self.scales.gamma.data.masked_fill_(padded[self.scales.owner], 0.0)

    def limit_of_round(self, task: Task) -> float:
        """The cost that this round may leave, in MACs, parameters or milliseconds."""
        full, limit = float(task.budget.cost(task.graph)), task.budget.limit(task.graph)
        part = (self.round + 1) / self.config.rounds
        if self.config.slices == "geometric":
            return float(full * (limit / full) ** part)
        return full - part * (full - limit)

    @torch.no_grad()
    def end_recover(self, task: Task) -> Metrics:
        """Compare the candidate with those before it, and begin the next one, or the next round from the best."""
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
        self.begin(task)
        return metrics

    def snapshot(self) -> dict[str, Any]:
        """Everything that a candidate changes."""
        tensors = [tensor.detach().clone() for tensor in (*self.linear, *self.shifts, *self.statistics)]
        return {"scales": self.scales.state_dict(), "tensors": tensors}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a snapshot."""
        self.scales.load_state_dict(snapshot["scales"])
        for tensor, value in zip((*self.linear, *self.shifts, *self.statistics), snapshot["tensors"], strict=True):
            tensor.copy_(value)

    def plan(self, task: Task) -> PruningPlan:
        """Keep what the last round has left open."""
        self.scales.write()
        task.model.eval()
        return task.graph.plan(self.scales.open.cpu() | ~self.may_go)

    def state_dict(self) -> dict[str, Any]:
        """Scales, optimiser, and where the rounds are."""
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
            ValueError: if the state is of another network.
        """
        self.scales.load_state_dict(state["scales"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.round, self.candidate = int(state["round"]), int(state["candidate"])
        self.start, self.best = dict(state["start"]), dict(state["best"])
        self.penalty = float(state["penalty"])
        saved = (state[name].to(self.threshold) for name in ("threshold", "reach", "unit"))
        self.threshold, self.reach, self.unit = saved


def costs(task: Task, kept: Tensor, may_go: Tensor) -> Tensor:
    """What one channel more costs, for each unit: the c of eqs. 5 and 6.

    The cost of the network as it is, less that with one channel less in the unit's group; so it counts where the
    channel is made and where it is read. Of a latency a step of 8 channels is taken.

    Args:
        task: graph and budget, which says what counts.
        kept: the units that are there, bool [U].
        may_go: the units that are asked about, bool [U].

    Returns:
        float64 [U], at least 0, with mean 1 over the kept units that may go; 0 for the others.
    """
    graph, meter = task.graph, task.budget.meter(task.graph)
    groups = graph.group_of_unit
    widths = torch.zeros(len(graph.groups), dtype=torch.float64).index_add(0, groups, kept.double())
    step = torch.full_like(widths, LATENCY_STEP if task.budget.resource == "latency" else 1).minimum(widths)
    less = meter.of_widths(widths - step.diag())
    each = ((meter.of_widths(widths) - less) / step.clamp(min=1)).clamp(min=0)
    counted = kept & may_go
    of_unit = torch.where(counted, each[groups], 0.0)
    mean = of_unit.sum() / counted.sum().clamp(min=1)
    return of_unit / mean if mean > 0 else of_unit


@torch.no_grad()
def closed_by_scales(graph: ChannelGraph, model: nn.Module, masked: MaskedNetwork) -> Tensor:
    """The units whose readers see zeros once γ and β of all their batch norms are zero, bool [U]; found by trying.

    Not so where something reaches a reader past every batch norm: a convolution without one, or an activation that
    makes something of zero. Units of frozen batch norms do not count either.
    """
    norms = unit_batch_norms(graph, model)
    inputs = probes(graph, next(model.parameters()).device)
    closed = torch.zeros(graph.num_units, dtype=torch.bool)
    passed, frozen = torch.zeros(2, graph.num_units, dtype=torch.bool)
    for norm in norms:
        passed[norm.units[norm.units >= 0]] = True
        if not norm.module.weight.requires_grad:
            frozen[norm.units[norm.units >= 0]] = True
    for group in graph.groups:
        if not bool(passed[group.units].any()):
            continue
        affected: list[tuple[Tensor, Tensor]] = []
        for norm in norms:
            inside = ((norm.units >= group.start) & (norm.units < group.start + group.size)).nonzero().flatten()
            for parameter in (norm.module.weight, norm.module.bias):
                if len(inside) and parameter is not None:
                    affected.append((parameter, parameter.clone()))
                    parameter.index_fill_(0, inside.to(parameter.device), 0.0)
        closed[group.units] = (masked.energies(*inputs)[group.units] == 0).cpu() & (passed & ~frozen)[group.units]
        for tensor, value in affected:
            tensor.copy_(value)
    return closed
