"""Structural alignment for network pruning through partial regularization (SANP; Gao et al., ICCV 2023).

The whole network trains. Meanwhile a generator learns on a small part of the samples which channels to prune, and a
group lasso on these channels, and no others, shrinks them to zero. Removing them then costs little accuracy:

    min_W  cross-entropy + λ Σ_l α_l Σ_{i pruned} ‖W_{l,i}‖₂        α_l: the weight of a layer, Σ α_l = 1

by a proximal step after every step of the optimiser with learning rate η: W ← W max(0, 1 − ηλα_l / ‖W‖). It changes no
bit of the kept channels. The generator is that of DP: one relaxed gate per channel, under

    J = cross-entropy(masked network) + λ_R |log(r/p)|             no gradient where |r − p| ≤ 0.005

Four phases: the weights alone; with the generator; with generator and lasso; with the lasso and fixed gates. The
paper's text leaves much open; docs/decisions/029-fill-sanps-gaps-from-ato.md and 030-set-sanps-penalty-per-channel.md
record the choices that come from the successor's code and our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastprune.graph.interior import GROUPS
from fastprune.graph.plan import PruningPlan
from fastprune.graph.structure import Role
from fastprune.methods.contract import Task
from fastprune.methods.gates.dp import DP, RelaxedGates
from fastprune.methods.gates.generators import ScoreGenerator
from fastprune.methods.gates.regularisers import two_sided
from fastprune.methods.scores.filters import unit_table
from fastprune.ops import group_prox_
from fastprune.options import option
from fastprune.training.options import WeightOptions
from fastprune.training.phases import Metrics, Phase, SideSteps
from fastprune.training.weight_training import WeightTraining

DEAD_ZONE = 0.005  # |r − p| up to which the cost term has no gradient

QUANTILE = 0.9  # fraction of the pruned channels that half of the automatic λ shrinks to zero

NORM_ROLES: dict[str, tuple[tuple[Role, ...], ...]] = {
    "joint": (("out", "depthwise", "channel"),),
    "apart": (("out", "depthwise"), ("in",)),
}
"""For each value of the option ``lasso`` the penalised norms of a unit, each by the roles of its parameters."""


@dataclass(frozen=True)
class SANPConfig(WeightOptions, RelaxedGates):
    """Options of SANP: common defaults for the training on CIFAR-10, the authors' releases' for the generator."""

    epochs: int = option(200, "passes over the training set", minimum=1)
    penalty: float | None = option(
        None,
        "λ of the group lasso; none = twice the value that would shrink nine in ten of the pruned channels to zero by "
        "the end of a training without cross-entropy",
        minimum=0.0,
    )
    balance: Literal["proportional", "inverse", "uniform"] = option(
        "proportional", "α of a layer: proportional to its number of pruned channels, to the inverse, or uniform"
    )
    lasso: Literal["joint", "apart"] = option(
        "joint", "joint: one norm for a channel's filter and batch norm; apart: one for its filter, one for its readers"
    )
    warm_up: float = option(0.1, "fraction of the epochs before the generator starts", minimum=0.0, maximum=1.0)
    alignment: float = option(0.5, "fraction of the epochs before the lasso starts", minimum=0.0, maximum=1.0)
    freeze: float = option(0.05, "fraction of the epochs, at the end, with fixed gates", minimum=0.0, maximum=1.0)
    every: int = option(20, "steps of the weights per step of the generator", minimum=1)
    part: float = option(0.05, "fraction of the training samples for the generator", minimum=0.0, maximum=1.0)
    generator_lr: float = option(1e-3, "learning rate of the generator, constant", minimum=0.0)
    generator_decay: float = option(1e-2, "weight decay of the generator's matrices", minimum=0.0)
    regularisation: float = option(4.0, "λ_R, the weight of the cost term", minimum=0.0)
    groups: Literal["auto", "interior", "all"] = option("auto", GROUPS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.warm_up <= self.alignment <= 1 - self.freeze:
            raise ValueError(
                f"warm_up {self.warm_up}, alignment {self.alignment}, freeze {self.freeze}: the generator must start "
                "before the lasso, and the lasso before the gates freeze; give warm_up ≤ alignment ≤ 1 − freeze"
            )


class SANP(DP):
    """Learn during the training which channels to prune, and shrink these to zero before they are removed."""

    name = "sanp"
    paper = "Gao et al., Structural Alignment for Network Pruning through Partial Regularization, ICCV 2023"
    trains_weights = True
    Config: ClassVar[type[Any]] = SANPConfig

    def setup(self, task: Task) -> None:
        """Create the generator, the optimiser of the weights and the tables of the lasso.

        Raises:
            BudgetError: if the budget is out of reach with these gates; says what is in reach.
        """
        assert task.data is not None
        super().setup(task)
        config = self.config
        self.training = WeightTraining(
            task.model,
            config,
            steps_per_epoch=task.data.steps(config.batch_size),
            device=task.device,
            peers=task.distributed,
            objective=task.objective,
        )
        self.tables = [
            unit_table(task.graph, task.model, roles, self.placement.units()) for roles in NORM_ROLES[config.lasso]
        ]
        self.group_of_gate = task.graph.group_of_unit.to(task.device)[self.placement.index]
        self.penalty = config.penalty
        self.choose_channels()

    def make_generator(self, sizes: list[int], seed: int) -> ScoreGenerator:
        """Create the generator with undivided scores: it takes one step for twenty of the weights."""
        return ScoreGenerator(sizes, self.config.architecture, seed, divided=False)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Create AdamW without decay on the parameters of the layer norm."""
        config, parameters = self.config, list(self.scores.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.generator_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.generator_lr, fused=True)

    def cost_term(self, ratio: Tensor) -> Tensor:
        """Compute |log(r/p)|, without a gradient in the dead zone."""
        near = (ratio - self.placement.target).abs() <= DEAD_ZONE
        return two_sided(torch.where(near, ratio.detach(), ratio), self.placement.target)

    def phases(self, task: Task) -> Iterator[Phase]:
        """Yield warm-up, generator, alignment and freeze, each of 0 epochs or more."""
        assert task.data is not None
        config = self.config
        ends = [config.warm_up, config.alignment, 1 - config.freeze, 1.0]
        epochs = [round(end * config.epochs) for end in ends]
        generator = SideSteps(
            every=config.every,
            step=lambda inputs, targets: self.generator_step(task, inputs, targets),
            samples=max(1, round(config.part * task.data.samples)),
            batch_size=config.batch_size,
            augment=config.augment,
        )
        task.model.train()
        begin = 0
        for name, end in zip(("warm_up", "generator", "alignment", "freeze"), epochs, strict=True):
            aligns = name in ("alignment", "freeze")
            yield Phase(
                name,
                end - begin,
                self.align_step if aligns else self.weight_step,
                batch_size=config.batch_size,
                augment=config.augment,
                end_epoch=self.make_end_epoch(task, begin),
                beside=generator if name in ("generator", "alignment") else None,
            )
            begin = end
        self.training.share_buffers()
        task.model.eval()

    def weight_step(self, inputs: Any, targets: Any) -> Metrics:
        """Take one step of the weights."""
        metrics = self.training.gradients(inputs, targets)
        self.training.update()
        return metrics

    def align_step(self, inputs: Any, targets: Any) -> Metrics:
        """Take one step of the weights, then the proximal step on the pruned channels."""
        rate = self.training.learning_rate
        metrics = self.weight_step(inputs, targets)
        if self.penalty is None:
            self.penalty = self.find_penalty()
        if self.penalty:
            for table in self.tables:
                group_prox_(table, (rate * self.penalty) * self.balance)
        return metrics

    def generator_step(self, task: Task, inputs: Any, targets: Any) -> Metrics:
        """Take one step of the generator on the current weights, then choose the pruned channels again."""
        metrics = self.step_on(task, inputs, targets)
        self.choose_channels()
        return {f"generator_{name}": value for name, value in metrics.items()}

    def choose_channels(self) -> None:
        """Set ``balance`` [U]: the α of the layer for channels that the gates prune, 0 for the kept ones."""
        closed = self.gates() == 0
        counts = torch.zeros(int(self.group_of_gate.max()) + 1, device=closed.device)
        counts = counts.index_add(0, self.group_of_gate, closed.float())
        rule = self.config.balance
        weights = counts if rule == "proportional" else (counts > 0).float()
        if rule == "inverse":
            weights = weights / counts.clamp(min=1)
        alpha = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        balance = torch.where(closed, alpha[self.group_of_gate], 0.0)
        table = self.tables[0]
        self.balance = torch.zeros(table.num_units, device=table.device, dtype=table.dtype)
        self.balance[self.placement.index] = balance.to(table.dtype)

    def make_end_epoch(self, task: Task, begin: int) -> Callable[[int], Metrics]:
        """Return ``end_epoch`` for a phase that starts at epoch ``begin`` of the run."""
        return lambda epoch: self.end_epoch(task, begin + epoch)

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """Return the keep ratios, the fraction of pruned channels at zero, and, when due, the alignment gap."""
        self.training.share_buffers()
        metrics = dict(super().end_epoch(task, epoch))
        measure = task.objective.measure_name
        if f"proxy_{measure}" in metrics and task.data is not None:
            metrics[f"held_out_{measure}"] = task.measure(task.model)
            metrics["alignment_gap"] = metrics[f"held_out_{measure}"] - metrics[f"proxy_{measure}"]
        pruned = self.balance > 0
        if bool(pruned.any()):
            metrics["zero_channels"] = (self.norms()[pruned] == 0).float().mean()
        return metrics

    def norms(self) -> Tensor:
        """Return the largest norm of each unit, [U]."""
        return torch.stack([table.norms() for table in self.tables]).amax(0)

    def plan(self, task: Task) -> PruningPlan:
        """Keep z + b ≥ 0; if that misses the budget, keep the channels of highest z."""
        plan = super().plan(task)
        if task.data is not None and task.data.held_out:
            gates = plan.mask.to(task.device, torch.float32)
            with torch.no_grad():
                masked = task.measure(self.masked.under(gates))
            full, measure = task.measure(task.model), task.objective.measure_name
            self._results |= {f"{measure}_full": full, f"{measure}_masked": masked, "alignment_gap": full - masked}
        if self.penalty is not None:
            self._results["penalty"] = self.penalty
        return plan

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator, the state of the weights' optimiser, and λ."""
        return {**super().state_dict(), "training": self.training.state_dict(), "penalty": self.penalty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is for other gates.
        """
        super().load_state_dict(state)
        self.training.load_state_dict(state["training"])
        self.penalty = state["penalty"]
        self.choose_channels()

    def find_penalty(self) -> float | None:
        """Return the λ of ``penalty=none``; None as long as no channel is pruned."""
        pruned = self.balance > 0
        rates = self.training.remaining_rates
        if not bool(pruned.any()) or rates == 0:
            return None
        needed = self.norms()[pruned].double() / self.balance[pruned].double()
        return 2 * float(needed.quantile(QUANTILE)) / rates
