"""The clauses of the contract, one function each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
import yaml

from fastprune.engine.checkpoint import load_state, save_state
from fastprune.engine.run import RunDirectory
from fastprune.graph.plan import PruningPlan
from fastprune.host.distributed import Distributed
from fastprune.methods.contract import Method
from fastprune.methods.registry import class_fault, configure
from fastprune.planning.budget import Budget, BudgetError
from fastprune.planning.limits import Limits
from fastprune.testing.trial import ContractError, Killed, Trial, describe_difference, same
from fastprune.training.phases import Phase, Rounds, SideSteps

BUDGETS = (Budget("flops", 0.5), Budget("params", 0.6), Budget("flops", 1.2e6))
LIMITS = Limits(min_keep=3, round_to=4, keep_ratios={"*": (0.3, 1.0)})
PROCESS_SECONDS = 300.0


def check_method(method_class: type[Method], *, distributed: bool = False, **options: Any) -> None:
    """Check that a method keeps the contract of ``fastprune.methods.Method``.

    Budgets (a fraction and an absolute number of MACs, a fraction of the parameters) are met from below, to within 1 %
    of the full network; one out of reach is refused with ``BudgetError``. The run's limits (smallest widths, rounding)
    hold. The plan can be applied exactly (float64, 1e-9). Weights, buffers, gradients and flags stay the same, unless
    the method declares ``trains_weights``. The same seed gives the same plan, also after a kill and a resume from a
    checkpoint. The configuration survives JSON and YAML.

    Args:
        method_class: the method.
        distributed: whether to run it in two processes too, which must agree. This takes some seconds more, and the
            class must be importable.
        **options: fields of its ``Config``; choose small numbers of epochs and samples.

    Raises:
        ContractError: if a clause is broken; names it.
        ValueError, TypeError: for options that the method does not have.
    """
    check_class(method_class)
    config = configure(method_class, options)
    check_config(method_class, config)
    check_state(method_class, config)
    check_phases(method_class, config)
    first = Trial(method_class, config, BUDGETS[0])
    plan, steps = first.run_checked()
    for budget in BUDGETS[1:]:
        Trial(method_class, config, budget).run_checked()
    check_limits(method_class, config)
    check_refusal(method_class, config)
    check_seed(method_class, config, plan)
    check_resume(first, plan, steps)
    if distributed:
        check_distributed(method_class, config)


def describe_phase(phase: Phase | Rounds | SideSteps) -> dict[str, Any]:
    """Return the fields of a phase that can be compared: all but its functions."""
    fields = {field.name: getattr(phase, field.name) for field in dataclasses.fields(phase)}
    plain = {name: value for name, value in fields.items() if not callable(value)}
    return {name: describe_phase(value) if isinstance(value, SideSteps) else value for name, value in plain.items()}


def check_class(method_class: type[Method]) -> None:
    """Check that the registry accepts the class: its name, paper and Config."""
    fault = class_fault(method_class)
    if fault is not None:
        raise ContractError(str(getattr(method_class, "name", method_class)), "class", fault)


def check_config(method_class: type[Method], config: Any) -> None:
    """Check that every option is explained, and that the options survive JSON and YAML."""
    for field in dataclasses.fields(config):
        if not field.metadata.get("help"):
            raise ContractError(method_class.name, "config", f'option {field.name!r} has no metadata["help"]')
    formats: dict[str, Callable[[Any], Any]] = {
        "JSON": lambda values: json.loads(json.dumps(values)),
        "YAML": lambda values: yaml.safe_load(yaml.safe_dump(values)),
    }
    for form, write_and_read in formats.items():
        try:
            again = configure(method_class, write_and_read(dataclasses.asdict(config)))
        except Exception as error:
            raise ContractError(method_class.name, "config", f"Config does not survive {form}: {error}") from error
        if again != config:
            raise ContractError(method_class.name, "config", f"Config {config} comes back from {form} as {again}")


def check_state(method_class: type[Method], config: Any) -> None:
    """Check that the state can be written, and that a fresh method that loads it has the same state."""
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
    """Check that the phases are the same on every call, and that ``needs_data`` is declared."""
    trial = Trial(method_class, config, BUDGETS[0])
    trial.method.setup(trial.task)
    first, second = (list(map(describe_phase, trial.method.phases(trial.task))) for _ in range(2))
    if first != second:
        raise trial.fail("phases", f"phases() differs from call to call: {first}, then {second}")
    if first and not method_class.needs_data:
        raise trial.fail("phases", "phases() reads data, but needs_data is False")


def check_limits(method_class: type[Method], config: Any) -> None:
    """Check that smallest widths and their rounding hold."""
    trial = Trial(method_class, config, Budget("flops", 0.65), limits=LIMITS)
    trial.run()
    trial.check_limits(trial.plan())


def check_refusal(method_class: type[Method], config: Any) -> None:
    """Check that a budget out of reach is refused."""
    trial = Trial(method_class, config, Budget("params", 0.002))
    try:
        trial.run()
        trial.plan()
    except BudgetError:
        return
    raise trial.fail("refusal", "the budget params=0.002 cannot be met, but no BudgetError was raised")


def check_seed(method_class: type[Method], config: Any, plan: PruningPlan) -> None:
    """Check that the same seed gives the same plan, whatever the process drew before."""
    trial = Trial(method_class, config, BUDGETS[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(987)
        random.seed(987)
        np.random.seed(987)  # noqa: NPY002 - the global generator is what a careless method draws from
        trial.run()
        again = trial.plan()
    if not torch.equal(plan.mask, again.mask):
        raise trial.fail("seed", f"the same seed gave two plans, {describe_difference(plan, again)}")


def check_resume(first: Trial, plan: PruningPlan, steps: int) -> None:
    """Check that a run killed after a step, or before ``plan``, and resumed ends in the same state and plan."""
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
            if not same(dict(first.task.model.state_dict()), dict(resumed.task.model.state_dict())):
                raise first.fail("resume", f"{when} and resumed, the method ends with other weights")
        if not torch.equal(plan.mask, again.mask):
            raise first.fail("resume", f"{when} and resumed, the plan differs {describe_difference(plan, again)}")


def check_distributed(method_class: type[Method], config: Any) -> None:
    """Check that two processes end with the same plan and weights."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=run_one_of_two, args=(rank, folder, method_class, dataclasses.asdict(config)))
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
            message = f"two processes ended with two plans, {describe_difference(first, second)}"
            raise ContractError(method_class.name, "distributed", message)
        if not same(*(load_state(Path(folder) / f"model-{rank}") for rank in range(2))):
            raise ContractError(method_class.name, "distributed", "two processes ended with two networks")


def run_one_of_two(rank: int, folder: str, method_class: type[Method], options: dict[str, Any]) -> None:
    """Run the method as one of two processes and write its plan, or the error."""
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
        trial = Trial(method_class, configure(method_class, options), BUDGETS[0], Distributed(rank, 2))
        trial.run()
        trial.plan().save(Path(folder) / f"plan-{rank}.json")
        save_state(Path(folder) / f"model-{rank}", dict(trial.task.model.state_dict()))
        torch.distributed.barrier()
        Distributed.leave()
    except Exception:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
