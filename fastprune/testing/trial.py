"""One run of a method through the real engine, with checks of its outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from fastprune.engine.device import Placement
from fastprune.engine.evaluate import HeldOut
from fastprune.engine.loop import LoopOptions, run_phases
from fastprune.engine.run import RunDirectory
from fastprune.graph.plan import PruningPlan
from fastprune.host.distributed import Distributed
from fastprune.methods.contract import Method, Task
from fastprune.planning.budget import TOLERANCE, Budget
from fastprune.planning.limits import Limits
from fastprune.surgery import SurgeryError, cut, verify
from fastprune.testing.network import network, sample_data, traced
from fastprune.training.phases import Metrics, Phase, Rounds


class ContractError(AssertionError):
    """A method that breaks the contract.

    Args:
        method: the method's name.
        clause: the broken part of the contract: "class", "config", "phases", "budget", "limits", "refusal", "exact",
            "weights", "flags", "seed", "state", "resume", "results" or "distributed".
        message: the fault, and what is needed.
    """

    def __init__(self, method: str, clause: str, message: str) -> None:
        super().__init__(f"method {method!r} breaks the contract ({clause}): {message}")
        self.clause = clause


class Killed(Exception):  # noqa: N818 - stands for a signal, not for an error
    """The end of a run, in place of the death of its process."""


@dataclasses.dataclass
class Trial:
    """One run of a method on its own copy of the test network.

    Args:
        method_class: the method.
        config: the method's configuration.
        budget: the budget of the plan.
        distributed: this process among its peers.
        limits: the limits of the plan's widths.
    """

    method_class: type[Method]
    config: Any
    budget: Budget
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.data = sample_data() if self.method_class.needs_data else None
        self.task = Task(
            model=network(),
            graph=traced(),
            budget=self.budget,
            limits=self.limits,
            seed=11,
            distributed=self.distributed,
            data=HeldOut(self.data, Placement(), self.distributed) if self.data is not None else None,
            rng=torch.Generator().manual_seed(11),
        )
        self.method = self.method_class(self.config)

    def fail(self, clause: str, message: str) -> ContractError:
        """Return the error of a broken clause."""
        return ContractError(self.method_class.name, clause, message)

    def run(self, run: RunDirectory | None = None, *, resume: bool = False, stop_after: int | None = None) -> int:
        """Set up and run the phases; return the number of steps. ``Killed`` is raised after step ``stop_after``."""
        self.method.setup(self.task)
        counter = StepCounter(self.method, stop_after)
        options = LoopOptions(log_every=1, checkpoint_steps=2, progress=False)
        run_phases(counter, self.task, self.data, run=run, resume=resume, options=options)
        return counter.steps

    def plan(self) -> PruningPlan:
        """Return the method's plan, which must be for this network."""
        plan = self.method.plan(self.task)
        if not isinstance(plan, PruningPlan):
            raise self.fail("budget", f"plan() returned a {type(plan).__name__}, not a PruningPlan")
        if len(plan.mask) != self.task.graph.num_units:
            raise self.fail("budget", "plan() returned a plan for another network")
        return plan

    def run_checked(self) -> tuple[PruningPlan, int]:
        """Run, check everything that one run can show, and return the plan and the number of steps."""
        before = photograph(self.task.model)
        steps = self.run()
        plan = self.plan()
        self.check_untouched(before)
        self.check_budget(plan)
        self.check_exact(plan)
        self.check_results()
        return plan, steps

    def check_untouched(self, before: Photograph) -> None:
        """Check that weights, gradients and flags are the same as before."""
        after = photograph(self.task.model)
        if not self.method_class.trains_weights:
            changed = [n for n, t in before.tensors.items() if not torch.equal(t, after.tensors[n])]
            if changed:
                raise self.fail("weights", f"{', '.join(changed[:4])} changed, but trains_weights is False")
            if after.gradients:
                raise self.fail("weights", f"gradients were computed for {', '.join(after.gradients[:4])}")
        for what in ("requires_grad", "training"):
            was, now = getattr(before, what), getattr(after, what)
            changed = [name or "the model" for name in was if was[name] != now[name]]
            if changed:
                raise self.fail("flags", f"{what} of {', '.join(changed[:4])} was not put back")

    def check_budget(self, plan: PruningPlan) -> None:
        """Check that the budget is met from below, and nearly used up."""
        graph = self.task.graph
        total, limit = float(self.budget.cost(graph)), self.budget.limit(graph)
        cost = float(self.budget.cost(graph, plan.mask))
        if cost > limit:
            raise self.fail("budget", f"{self.budget}: the plan costs {cost:.0f}, above the limit of {limit:.0f}")
        if cost < limit - TOLERANCE * total:
            raise self.fail(
                "budget", f"{self.budget}: the plan costs {cost:.0f}, more than 1 % of {total:.0f} below {limit:.0f}"
            )

    def check_limits(self, plan: PruningPlan) -> None:
        """Check that all widths are allowed, and that the budget is met."""
        graph = self.task.graph
        broken = self.limits.broken_by(graph, plan.mask)
        if broken is not None:
            raise self.fail("limits", f"{broken}; use fastprune.planning.fitting.fit(…, limits=task.limits)")
        if float(self.budget.cost(graph, plan.mask)) > self.budget.limit(graph):
            raise self.fail("limits", f"with {self.limits} the plan costs more than the budget {self.budget}")

    def check_exact(self, plan: PruningPlan) -> None:
        """Check that the compact network computes the same as the masked one, and has the parameters of the plan."""
        try:
            compact = cut(plan, self.task.model).model
            verify(plan, self.task.model, compact, dtype=torch.float64)
        except (SurgeryError, ValueError) as error:
            raise self.fail("exact", str(error)) from error
        params = sum(parameter.numel() for parameter in compact.parameters())
        if params != plan.params[1]:
            raise self.fail("exact", f"the compact network has {params} parameters, the plan says {plan.params[1]}")

    def check_results(self) -> None:
        """Check that all results are numbers."""
        for name, value in dict(self.method.results()).items():
            if not isinstance(name, str) or not isinstance(value, (int, float, Tensor)):
                raise self.fail("results", f"results() gives {name!r}: {value!r}, where a number is needed")


@dataclasses.dataclass
class StepCounter:
    """A method with a counter of its steps, and an end after some of them.

    Args:
        method: the method.
        stop_after: the number of steps after which ``Killed`` is raised; None = never.
        steps: the number of steps so far.
    """

    method: Method
    stop_after: int | None
    steps: int = 0

    @property
    def trains_weights(self) -> bool:
        """Whether the method trains weights."""
        return self.method.trains_weights

    def phases(self, task: Task) -> Iterator[Phase | Rounds]:
        """Yield the method's phases, with steps and rounds that count."""
        for phase in self.method.phases(task):
            if isinstance(phase, Rounds):
                yield dataclasses.replace(phase, round=self.count(phase.round))
                continue
            beside = phase.beside and dataclasses.replace(phase.beside, step=self.count(phase.beside.step))
            yield dataclasses.replace(phase, step=self.count(phase.step), beside=beside)

    def count(self, step: Callable[..., Metrics]) -> Callable[..., Metrics]:
        """Return ``step`` with the counter behind it."""

        def counted(*batch: Tensor) -> Metrics:
            metrics = step(*batch)
            self.steps += 1
            if self.steps == self.stop_after:
                raise Killed
            return metrics

        return counted

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state."""
        return self.method.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the method's state."""
        self.method.load_state_dict(state)


@dataclasses.dataclass(frozen=True)
class Photograph:
    """The state of a model that a search must not change.

    Args:
        tensors: copies of parameters and buffers.
        gradients: names of the parameters that hold a gradient.
        requires_grad: flag of each parameter.
        training: mode of each module.
    """

    tensors: dict[str, Tensor]
    gradients: list[str]
    requires_grad: dict[str, bool]
    training: dict[str, bool]


def photograph(model: nn.Module) -> Photograph:
    """Return the present state of ``model``."""
    parameters = dict(model.named_parameters())
    return Photograph(
        tensors={name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        gradients=[name for name, parameter in parameters.items() if parameter.grad is not None],
        requires_grad={name: parameter.requires_grad for name, parameter in parameters.items()},
        training={name: module.training for name, module in model.named_modules()},
    )


def same(a: Any, b: Any) -> bool:
    """Return whether two nests of plain values and tensors are equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def describe_difference(a: PruningPlan, b: PruningPlan) -> str:
    """Return the number of channels in which two plans differ, as text."""
    return f"in {int((a.mask != b.mask).sum())} of {len(a.mask)} channels"
