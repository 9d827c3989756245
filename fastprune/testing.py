"""Contract tests that the author of a method runs against it.

    from fastprune.testing import check_method

    def test_my_method_keeps_the_contract():
        check_method(MyMethod, epochs=2)

It runs the method through the real engine on a small network (a residual block, a depthwise convolution with
squeeze-and-excitation, a linear classifier) and made images, and takes seconds on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
import yaml
from torch import Tensor, nn

from fastprune.budget import Budget, BudgetError
from fastprune.distributed import Distributed
from fastprune.engine.checkpoint import load_state, save_state
from fastprune.engine.data import SourceData
from fastprune.engine.device import Placement
from fastprune.engine.evaluate import HeldOut
from fastprune.engine.loop import LoopOptions, run_phases
from fastprune.engine.run import RunDirectory
from fastprune.engine.synthetic import SyntheticSource
from fastprune.graph import ChannelGraph, trace
from fastprune.methods.contract import Method, Metrics, Phase, Task
from fastprune.methods.registry import class_fault, configure
from fastprune.plan import PruningPlan
from fastprune.surgery import SurgeryError, apply, verify

TOLERANCE = 0.01  # of the full cost: how far below the budget a plan may be
SHAPE, NUM_CLASSES = (3, 16, 16), 10
BUDGETS = (Budget("flops", 0.5), Budget("params", 0.6), Budget("flops", 1.2e6))
PROCESS_SECONDS = 300.0


class ContractError(AssertionError):
    """A method that breaks the contract.

    Args:
        method: the method's name.
        clause: which part of the contract: "class", "config", "phases", "budget", "refusal", "exact", "weights",
            "flags", "seed", "state", "resume", "results" or "distributed".
        message: what was found, and what is needed.
    """

    def __init__(self, method: str, clause: str, message: str) -> None:
        super().__init__(f"method {method!r} breaks the contract ({clause}): {message}")
        self.clause = clause


def check_method(method_class: type[Method], *, distributed: bool = False, **options: Any) -> None:
    """Check that a method keeps the contract of ``fastprune.methods.Method``.

    Budgets (a fraction and an absolute number of MACs, a fraction of the parameters) are met from below, to within 1 %
    of the full network; one out of reach is refused with ``BudgetError``. The plan can be applied exactly (float64,
    1e-9). Weights, buffers, gradients and flags are as before unless ``trains_weights``. The same seed gives the same
    plan, also after a kill and a resume from a checkpoint. The configuration survives JSON and YAML.

    Args:
        method_class: the method.
        distributed: also run it in two processes, which must agree (some seconds more; the class must be importable).
        **options: fields of its ``Config``; choose small numbers of epochs and samples.

    Raises:
        ContractError: names the clause that is broken.
        ValueError, TypeError: for options that the method does not have.
    """
    check_class(method_class)
    config = configure(method_class, options)
    check_config(method_class, config)
    check_state(method_class, config)
    check_phases(method_class, config)
    first = Trial(method_class, config, BUDGETS[0])
    plan, steps = first.watched()
    for budget in BUDGETS[1:]:
        Trial(method_class, config, budget).watched()
    check_refusal(method_class, config)
    check_seed(method_class, config, plan)
    check_resume(first, plan, steps)
    if distributed:
        check_distributed(method_class, config)


class ContractNetwork(nn.Module):
    """Every kind of coupling in little space, with channels so cheap that 1 % of the cost is more than one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 16, 1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.expand = nn.Sequential(nn.Conv2d(16, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(96, 96, 3, 2, 1, groups=96, bias=False), nn.BatchNorm2d(96), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(96, 24, 1), nn.ReLU(), nn.Conv2d(24, 96, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(96, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.last = nn.Sequential(nn.Conv2d(24, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.classifier = nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [N, 10] of images [N, 3, 16, 16]."""
        x = self.stem(images)
        x = torch.relu(x + self.block(x))
        x = self.depthwise(self.expand(x))
        x = self.last(self.project(x * self.squeeze(x)))
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


class Killed(Exception):  # noqa: N818 - stands for a signal, not for an error
    """What a killed process would not live to see."""


@dataclasses.dataclass
class Trial:
    """One run of a method on a network of its own.

    Args:
        method_class: the method.
        config: of the method.
        budget: of the plan.
        distributed: this process among its peers.
    """

    method_class: type[Method]
    config: Any
    budget: Budget
    distributed: Distributed = dataclasses.field(default_factory=Distributed)

    def __post_init__(self) -> None:
        self.data = sample_data() if self.method_class.needs_data else None
        self.task = Task(
            model=network(),
            graph=traced(),
            budget=self.budget,
            seed=11,
            distributed=self.distributed,
            data=HeldOut(self.data, Placement(), self.distributed) if self.data is not None else None,
            rng=torch.Generator().manual_seed(11),
        )
        self.method = self.method_class(self.config)

    def fail(self, clause: str, message: str) -> ContractError:
        """The error to raise."""
        return ContractError(self.method_class.name, clause, message)

    def run(self, run: RunDirectory | None = None, *, resume: bool = False, stop_after: int | None = None) -> int:
        """Set up and run the phases; the number of steps. ``Killed`` is raised after step ``stop_after``."""
        self.method.setup(self.task)
        counted = Counted(self.method, stop_after)
        options = LoopOptions(log_every=1, checkpoint_steps=2, progress=False)
        run_phases(counted, self.task, self.data, run=run, resume=resume, options=options)
        return counted.steps

    def plan(self) -> PruningPlan:
        """The plan, if it is one for this network."""
        plan = self.method.plan(self.task)
        if not isinstance(plan, PruningPlan):
            raise self.fail("budget", f"plan() returned a {type(plan).__name__}, not a PruningPlan")
        if len(plan.mask) != self.task.graph.num_units:
            raise self.fail("budget", "plan() returned a plan for another network")
        return plan

    def watched(self) -> tuple[PruningPlan, int]:
        """The plan and the number of steps, with everything checked that one run can show."""
        before = photograph(self.task.model)
        steps = self.run()
        plan = self.plan()
        self.check_untouched(before)
        self.check_budget(plan)
        self.check_exact(plan)
        self.check_results()
        return plan, steps

    def check_untouched(self, before: Photograph) -> None:
        """Weights, gradients and flags are as they were."""
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
        """The budget is met from below, and nearly used up."""
        graph = self.task.graph
        total, limit = float(self.budget.of(graph.cost())), self.budget.limit(graph)
        cost = float(self.budget.of(graph.cost(plan.mask)))
        if cost > limit:
            raise self.fail("budget", f"{self.budget}: the plan costs {cost:.0f}, above the limit of {limit:.0f}")
        if cost < limit - TOLERANCE * total:
            raise self.fail(
                "budget", f"{self.budget}: the plan costs {cost:.0f}, more than 1 % of {total:.0f} below {limit:.0f}"
            )

    def check_exact(self, plan: PruningPlan) -> None:
        """The compact network computes what the masked one computes, and costs what the plan says."""
        try:
            compact = apply(plan, self.task.model, check=False)
            verify(plan, self.task.model, compact, dtype=torch.float64)
        except (SurgeryError, ValueError) as error:
            raise self.fail("exact", str(error)) from error
        params = sum(parameter.numel() for parameter in compact.parameters())
        if params != plan.params[1]:
            raise self.fail("exact", f"the compact network has {params} parameters, the plan says {plan.params[1]}")

    def check_results(self) -> None:
        """What is reported are numbers."""
        for name, value in dict(self.method.results()).items():
            if not isinstance(name, str) or not isinstance(value, (int, float, Tensor)):
                raise self.fail("results", f"results() gives {name!r}: {value!r}, where a number is needed")


@dataclasses.dataclass
class Counted:
    """A method whose steps are counted, and which dies after some of them."""

    method: Method
    stop_after: int | None
    steps: int = 0

    @property
    def trains_weights(self) -> bool:
        """The method's own."""
        return self.method.trains_weights

    def phases(self, task: Task) -> Iterator[Phase]:
        """The method's phases, with counting steps."""
        for phase in self.method.phases(task):
            yield dataclasses.replace(phase, step=self.counting(phase.step))

    def counting(self, step: Callable[[Tensor, Tensor], Metrics]) -> Callable[[Tensor, Tensor], Metrics]:
        """``step``, counted."""

        def counted(images: Tensor, labels: Tensor) -> Metrics:
            metrics = step(images, labels)
            self.steps += 1
            if self.steps == self.stop_after:
                raise Killed
            return metrics

        return counted

    def state_dict(self) -> dict[str, Any]:
        """The method's."""
        return self.method.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The method's."""
        self.method.load_state_dict(state)


@dataclasses.dataclass(frozen=True)
class Photograph:
    """What a search must leave as it is.

    Args:
        tensors: copies of parameters and buffers.
        gradients: parameters that hold a gradient.
        requires_grad: flag of each parameter.
        training: mode of each module.
    """

    tensors: dict[str, Tensor]
    gradients: list[str]
    requires_grad: dict[str, bool]
    training: dict[str, bool]


def photograph(model: nn.Module) -> Photograph:
    """The state of ``model`` now."""
    parameters = dict(model.named_parameters())
    return Photograph(
        tensors={name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        gradients=[name for name, parameter in parameters.items() if parameter.grad is not None],
        requires_grad={name: parameter.requires_grad for name, parameter in parameters.items()},
        training={name: module.training for name, module in model.named_modules()},
    )


def declared(phase: Phase) -> tuple[Any, ...]:
    """What of a phase can be compared."""
    return (phase.name, phase.epochs, phase.samples, phase.batch_size, phase.augment)


def network() -> ContractNetwork:
    """The test network with fixed random weights and statistics, in eval mode; one parameter is frozen on purpose."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = ContractNetwork()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    model.classifier.bias.requires_grad_(False)
    return model.eval()


@lru_cache(maxsize=1)
def traced() -> ChannelGraph:
    """The channel graph of the test network."""
    return trace(network(), torch.zeros(2, *SHAPE))


def sample_data() -> SourceData:
    """160 made images, 32 of them held out."""
    train, test = (
        SyntheticSource.make(SHAPE, NUM_CLASSES, first, size, seed=3) for first, size in ((0, 160), (160, 32))
    )
    return SourceData("contract", SHAPE, NUM_CLASSES, train, test, np.arange(32))


def check_class(method_class: type[Method]) -> None:
    """The class has a name, a paper and a Config that the registry accepts."""
    fault = class_fault(method_class)
    if fault is not None:
        raise ContractError(str(getattr(method_class, "name", method_class)), "class", fault)


def check_config(method_class: type[Method], config: Any) -> None:
    """Every option is explained, and the options survive JSON and YAML."""
    for field in dataclasses.fields(config):
        if not field.metadata.get("help"):
            raise ContractError(method_class.name, "config", f'option {field.name!r} has no metadata["help"]')
    round_trips: dict[str, Callable[[Any], Any]] = {
        "JSON": lambda values: json.loads(json.dumps(values)),
        "YAML": lambda values: yaml.safe_load(yaml.safe_dump(values)),
    }
    for form, there_and_back in round_trips.items():
        try:
            again = configure(method_class, there_and_back(dataclasses.asdict(config)))
        except Exception as error:
            raise ContractError(method_class.name, "config", f"Config does not survive {form}: {error}") from error
        if again != config:
            raise ContractError(method_class.name, "config", f"Config comes back from {form} as {again}, was {config}")


def check_state(method_class: type[Method], config: Any) -> None:
    """The state can be written, and a fresh method that has loaded it has the same state."""
    trial, fresh = (Trial(method_class, config, BUDGETS[0]) for _ in range(2))
    trial.method.setup(trial.task)
    fresh.method.setup(fresh.task)
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_state(Path(folder) / "state", trial.method.state_dict())
            fresh.method.load_state_dict(load_state(Path(folder) / "state"))
            save_state(Path(folder) / "again", fresh.method.state_dict())
        except Exception as error:
            raise trial.fail("state", f"state_dict() cannot be saved and loaded: {error}") from error
        if not same(load_state(Path(folder) / "state"), load_state(Path(folder) / "again")):
            raise trial.fail("state", "after load_state_dict(state), state_dict() is not that state")


def check_phases(method_class: type[Method], config: Any) -> None:
    """The phases are the same on every call, and declared to need data."""
    trial = Trial(method_class, config, BUDGETS[0])
    trial.method.setup(trial.task)
    first, second = (list(map(declared, trial.method.phases(trial.task))) for _ in range(2))
    if first != second:
        raise trial.fail("phases", f"phases() differs from call to call: {first}, then {second}")
    if first and not method_class.needs_data:
        raise trial.fail("phases", "phases() reads data, but needs_data is False")


def check_refusal(method_class: type[Method], config: Any) -> None:
    """A budget out of reach is refused."""
    trial = Trial(method_class, config, Budget("params", 0.002))
    try:
        trial.run()
        trial.plan()
    except BudgetError:
        return
    raise trial.fail("refusal", "the budget params=0.002 cannot be met, but no BudgetError was raised")


def check_seed(method_class: type[Method], config: Any, plan: PruningPlan) -> None:
    """The same seed gives the same plan, whatever the process drew before."""
    trial = Trial(method_class, config, BUDGETS[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(987)
        random.seed(987)
        np.random.seed(987)  # noqa: NPY002 - the global generator is what a careless method draws from
        trial.run()
        again = trial.plan()
    if not torch.equal(plan.mask, again.mask):
        raise trial.fail("seed", f"the same seed gave two plans, {different(plan, again)}")


def check_resume(first: Trial, plan: PruningPlan, steps: int) -> None:
    """A run that is killed after any step, or after the last one, ends in the same state and plan once resumed."""
    for stop_after in (*sorted({1, steps // 2, steps - 1} & set(range(1, steps))), None):
        when = f"killed after step {stop_after} of {steps}" if stop_after else "killed before plan()"
        with tempfile.TemporaryDirectory() as folder:
            run = RunDirectory.create(Path(folder) / "run", {})
            with contextlib.suppress(Killed):
                dataclasses.replace(first).run(run, stop_after=stop_after)
            resumed = dataclasses.replace(first)
            resumed.run(run, resume=True)
            if not same(first.method.state_dict(), resumed.method.state_dict()):
                raise first.fail("resume", f"{when} and resumed, the method ends in another state")
            again = resumed.plan()
        if not torch.equal(plan.mask, again.mask):
            raise first.fail("resume", f"{when} and resumed, the plan differs {different(plan, again)}")


def check_distributed(method_class: type[Method], config: Any) -> None:
    """Two processes end with the same plan."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=one_of_two, args=(rank, folder, method_class, dataclasses.asdict(config)))
            for rank in range(2)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(PROCESS_SECONDS)
        except Exception as error:
            raise ContractError(method_class.name, "distributed", f"cannot be sent to a process: {error}") from error
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
        plans = [Path(folder) / f"plan-{rank}.json" for rank in range(2)]
        for path in sorted(Path(folder).glob("error-*")):
            raise ContractError(method_class.name, "distributed", f"a process failed:\n{path.read_text()}")
        if not all(path.exists() for path in plans):
            raise ContractError(method_class.name, "distributed", "a process ended without a plan, or hung")
        first, second = map(PruningPlan.load, plans)
        if not torch.equal(first.mask, second.mask):
            message = f"two processes ended with two plans, {different(first, second)}"
            raise ContractError(method_class.name, "distributed", message)


def one_of_two(rank: int, folder: str, method_class: type[Method], options: dict[str, Any]) -> None:
    """Run the method as one of two processes and write its plan, or what went wrong."""
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
        trial = Trial(method_class, configure(method_class, options), BUDGETS[0], Distributed(rank, 2))
        trial.run()
        trial.plan().save(Path(folder) / f"plan-{rank}.json")
        torch.distributed.barrier()
        Distributed.leave()
    except Exception:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())


def same(a: Any, b: Any) -> bool:
    """Whether two nests of plain values and tensors are equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def different(a: PruningPlan, b: PruningPlan) -> str:
    """In how many channels two plans differ."""
    return f"in {int((a.mask != b.mask).sum())} of {len(a.mask)} channels"
