"""Structural alignment for network pruning through partial regularization (SANP; Gao et al., ICCV 2023).

The whole network trains. Beside it a generator learns which channels the budget leaves, on a small part of the samples,
and a group lasso on the channels that are to go, and on no others, carries those to zero, so that there is little left
to lose when they are cut:

    min_W  cross-entropy + λ Σ_l α_l Σ_{i goes} ‖W_{l,i}‖₂          α_l: a balance of the layers, Σ α_l = 1

by a proximal step after every step of the optimiser with learning rate η: W ← W max(0, 1 − ηλα_l / ‖W‖). What stays is
not touched, to the bit. The generator is that of DP: one relaxed gate per channel, under

    J = cross-entropy(masked network) + λ_R |log(r/p)|             nothing where |r − p| ≤ 0.005

Four phases: the weights alone; with the generator; with generator and lasso; with the lasso and the gates as they are.
The paper's text leaves much open; what is taken from the successor's code, or chosen here, is in docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

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

DEAD_ZONE = 0.005  # of |r − p|: no gradient for what is near enough

MOST = 0.9  # of the channels that go, for the automatic λ

UNITS_OF: dict[str, tuple[tuple[Role, ...], ...]] = {
    "joint": (("out", "depthwise", "channel"),),
    "apart": (("out", "depthwise"), ("in",)),
}
"""By the option ``lasso``: the parameters of a unit's norm, for each norm that is penalised."""


@dataclass(frozen=True)
class SANPConfig(WeightOptions, RelaxedGates):
    """Options of SANP; the training's are usual ones for CIFAR-10, the generator's those of the authors' releases."""

    epochs: int = option(200, "passes over the training set", minimum=1)
    penalty: float | None = option(
        None,
        "λ of the group lasso; none = twice the λ that would, without cross-entropy, carry nine in ten of the channels "
        "that are to go to zero by the end",
        minimum=0.0,
    )
    balance: Literal["proportional", "inverse", "uniform"] = option(
        "proportional",
        "α of a layer: proportional to the number of its channels that are to go, or to its inverse, or equal",
    )
    lasso: Literal["joint", "apart"] = option(
        "joint", "one norm for a channel's filter with its batch norm, or one for its filter and one for its readers"
    )
    warm_up: float = option(0.1, "part of the epochs before the generator starts", minimum=0.0, maximum=1.0)
    alignment: float = option(0.5, "part of the epochs before the lasso starts", minimum=0.0, maximum=1.0)
    freeze: float = option(
        0.05, "part of the epochs, at the end, in which the gates no longer change", minimum=0.0, maximum=1.0
    )
    every: int = option(20, "steps of the weights before each step of the generator", minimum=1)
    part: float = option(0.05, "part of the training samples that the generator sees", minimum=0.0, maximum=1.0)
    generator_lr: float = option(1e-3, "learning rate of the generator, constant", minimum=0.0)
    generator_decay: float = option(1e-2, "AdamW's decay of the generator's matrices", minimum=0.0)
    regularisation: float = option(4.0, "λ_R, the weight of the cost term", minimum=0.0)
    groups: Literal["interior", "all"] = option("interior", "gates inside blocks only, or on every channel that can go")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.warm_up <= self.alignment <= 1 - self.freeze:
            raise ValueError(
                f"warm_up {self.warm_up}, alignment {self.alignment}, freeze {self.freeze}: the generator must start "
                "before the lasso, and the lasso before the end in which the gates stay"
            )


class SANP(DP):
    """Learn while training which channels will go, and shrink those to nothing before they are cut."""

    name = "sanp"
    paper = "Gao et al., Structural Alignment for Network Pruning through Partial Regularization, ICCV 2023"
    trains_weights = True
    Config: ClassVar[type[Any]] = SANPConfig

    def setup(self, task: Task) -> None:
        """Make the generator, the optimiser of the weights and the tables of the lasso.

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
        )
        self.tables = [
            unit_table(task.graph, task.model, roles, self.placement.may_go()) for roles in UNITS_OF[config.lasso]
        ]
        self.group_of_gate = task.graph.group_of_unit.to(task.device)[self.placement.index]
        self.penalty = config.penalty
        self.choose()

    def make_generator(self, sizes: list[int], seed: int) -> ScoreGenerator:
        """The scores are not divided: there is one step of the generator in twenty."""
        return ScoreGenerator(sizes, self.config.architecture, seed, divided=False)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, which spares the norm's parameters."""
        config, parameters = self.config, list(self.scores.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.generator_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.generator_lr, fused=True)

    def cost_term(self, ratio: Tensor) -> Tensor:
        """|log(r/p)|, and no gradient in the dead zone."""
        near = (ratio - self.placement.target).abs() <= DEAD_ZONE
        return two_sided(torch.where(near, ratio.detach(), ratio), self.placement.target)

    def phases(self, task: Task) -> Iterator[Phase]:
        """Warm-up, generator, alignment, freeze; those of no epochs are left out."""
        assert task.data is not None
        config = self.config
        ends = [config.warm_up, config.alignment, 1 - config.freeze, 1.0]
        epochs = [round(end * config.epochs) for end in ends]
        generator = SideSteps(
            every=config.every,
            step=lambda images, labels: self.generator_step(task, images, labels),
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
                end_epoch=self.reporting(task, begin),
                beside=generator if name in ("generator", "alignment") else None,
            )
            begin = end
        self.training.share_buffers()
        task.model.eval()

    def weight_step(self, images: Tensor, labels: Tensor) -> Metrics:
        """One step of the weights."""
        metrics = self.training.gradients(images, labels)
        self.training.update()
        return metrics

    def align_step(self, images: Tensor, labels: Tensor) -> Metrics:
        """One step of the weights, and the proximal step on the channels that go."""
        rate = self.training.learning_rate
        metrics = self.weight_step(images, labels)
        if self.penalty is None:
            self.penalty = self.automatic()
        if self.penalty:
            for table in self.tables:
                group_prox_(table, (rate * self.penalty) * self.balance)
        return metrics

    def generator_step(self, task: Task, images: Tensor, labels: Tensor) -> Metrics:
        """One step of the generator on the network as it is, and the choice of channels anew."""
        metrics = self.step_on(task, images, labels)
        self.choose()
        return {f"generator_{name}": value for name, value in metrics.items()}

    def choose(self) -> None:
        """Read off the channels that go, and the α of each one's layer: ``balance`` [U], 0 for those that stay."""
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

    def reporting(self, task: Task, begin: int) -> Callable[[int], Metrics]:
        """What is logged after an epoch of a phase that begins with epoch ``begin`` of the run."""
        return lambda epoch: self.end_epoch(task, begin + epoch)

    def end_epoch(self, task: Task, epoch: int) -> Metrics:
        """The widths, how many of the channels that go are zero, and the accuracies with and without them when due."""
        self.training.share_buffers()
        metrics = dict(super().end_epoch(task, epoch))
        if "proxy_accuracy" in metrics and task.data is not None:
            metrics["held_out_accuracy"] = task.data.accuracy(task.model)
            metrics["alignment_gap"] = metrics["held_out_accuracy"] - metrics["proxy_accuracy"]
        goes = self.balance > 0
        if bool(goes.any()):
            metrics["zero_channels"] = (self.norms()[goes] == 0).float().mean()
        return metrics

    def norms(self) -> Tensor:
        """The largest of each unit's norms, [U]."""
        return torch.stack([table.norms() for table in self.tables]).amax(0)

    def plan(self, task: Task) -> PruningPlan:
        """Keep z + b ≥ 0; where that misses the budget, the channels of highest z."""
        plan = super().plan(task)
        if task.data is not None and task.data.held_out:
            gates = plan.mask.to(task.device, torch.float32)
            with torch.no_grad():
                cut = task.data.accuracy(lambda images: self.masked(images, gates))
            full = task.data.accuracy(task.model)
            self._results |= {"accuracy_full": full, "accuracy_masked": cut, "alignment_gap": full - cut}
        if self.penalty is not None:
            self._results["penalty"] = self.penalty
        return plan

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, that of the weights' optimiser, and λ."""
        return {**super().state_dict(), "training": self.training.state_dict(), "penalty": self.penalty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is for other gates.
        """
        super().load_state_dict(state)
        self.training.load_state_dict(state["training"])
        self.penalty = state["penalty"]
        self.choose()

    def automatic(self) -> float | None:
        """The λ of ``penalty=none``, None while no channel is to go."""
        goes = self.balance > 0
        rates = self.training.remaining_rates
        if not bool(goes.any()) or rates == 0:
            return None
        needed = self.norms()[goes].double() / self.balance[goes].double()
        return 2 * float(needed.quantile(MOST)) / rates
