"""``fastprune.prune``: the result, and what stays unchanged after an error."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.engine import LoopOptions, RunDirectory, RunError
from fastprune.engine.checkpoint import load_state, save_state
from fastprune.graph.export.refusals import TraceError
from fastprune.graph.plan import PruningPlan
from fastprune.methods.contract import Method, Task
from fastprune.options import option
from fastprune.planning.budget import Budget, BudgetError
from fastprune.training.phases import Metrics, Phase

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SHORT: dict[str, Any] = {"epochs": 2, "samples": 32, "batch_size": 16, "evaluate_every": 0}


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(32, 3, 16, 16, generator=generator), torch.arange(32) % 5
    return DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)


class Stub(Method):
    """A method that keeps the first part of each group, or fails in a chosen place."""

    name = "stub"

    @dataclass(frozen=True)
    class Config:
        fail: str = option("", "where to raise")
        keep: float = option(0.4, "part of each group that stays")
        steps: int = option(4, "number of epochs of one step")

    Config: type[Any] = Config

    def setup(self, task: Task) -> None:
        self.fail("setup")

    def phases(self, task: Task) -> Iterator[Phase]:
        yield Phase("stub", self.config.steps, self.step, batch_size=32)

    def step(self, images: Tensor, labels: Tensor) -> Metrics:
        self.fail("step")
        return {"loss": 1.0}

    def plan(self, task: Task) -> PruningPlan:
        self.fail("plan")
        mask = torch.zeros(task.graph.num_units, dtype=torch.bool)
        for group in task.graph.groups:
            mask[group.start : group.start + max(round(self.config.keep * group.size), 1)] = True
        return task.graph.plan(mask)

    def results(self) -> Metrics:
        return {"answer": torch.tensor(42.0)}

    def fail(self, place: str) -> None:
        if self.config.fail == place:
            raise RuntimeError(f"failed in {place}")


class NoSearch(Stub):
    name = "nosearch"

    def phases(self, task: Task) -> Iterator[Phase]:
        return iter(())


def state_of(model: nn.Module) -> tuple[Mapping[str, Tensor], dict[str, bool], dict[str, bool]]:
    return (
        copy.deepcopy(model.state_dict()),
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )


def assert_unchanged(model: nn.Module, before: tuple[Mapping[str, Tensor], dict[str, bool], dict[str, bool]]) -> None:
    after = state_of(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_result_of_a_search(tiny: nn.Module, tmp_path: Path) -> None:
    tiny.train()
    tiny.stem.eval()  # as with frozen batch norms
    tiny.head.bias.requires_grad_(False)
    before = state_of(tiny)
    out = tmp_path / "run"
    result = fp.prune(
        tiny, EXAMPLE, method="dmc", budget="flops=0.7", data=loader(), out=out, compensate="none", **SHORT
    )
    assert_unchanged(tiny, before)
    macs = result.metrics["macs"]
    assert macs["full"] == round(float(result.graph.cost().macs))
    assert macs["planned"] == round(float(fp.trace(result.model, EXAMPLE).cost().macs))
    assert 0.6 * macs["full"] < macs["planned"] <= 0.7 * macs["full"]
    assert result.metrics["params"]["planned"] == sum(p.numel() for p in result.model.parameters())
    assert result.metrics["difference"] < 2e-6
    assert {"loss", "open", "flops_of_plan"} <= result.metrics["search"].keys()
    assert result.metrics["search"]["flops_of_plan"] == pytest.approx(macs["planned"] / macs["full"])
    assert not result.model.training
    with torch.no_grad():
        torch.testing.assert_close(
            result.model(EXAMPLE), fp.masked(tiny.eval(), result.plan)(EXAMPLE), rtol=0, atol=1e-5
        )
    assert sorted(path.name for path in out.iterdir()) == [
        "baseline.safetensors", "checkpoints", "config.yaml", "metrics.jsonl", "model.safetensors", "network.json",
        "plan.json",
    ]  # fmt: skip
    run = RunDirectory.open(out)
    assert torch.equal(PruningPlan.load(run.plan_path).mask, result.plan.mask)
    assert run.config["dmc"] | SHORT == run.config["dmc"]
    assert run.metrics()[-1]["macs"] == macs


def test_a_partly_training_model_keeps_its_modes(tiny: nn.Module) -> None:
    tiny.bn1.train()  # while the model itself says eval
    before = state_of(tiny)
    fp.prune(tiny, EXAMPLE, method="l1", budget="flops=0.5")
    assert_unchanged(tiny, before)


def test_nothing_is_written_without_out(tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fp.prune(tiny, EXAMPLE, method="dmc", budget="flops=0.7", data=loader(), **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_loader_without_a_held_out_part_is_enough(tiny: nn.Module) -> None:
    """Then no accuracy is measured during the search; the default asks for one every 10 epochs."""
    options = {**SHORT, "evaluate_every": 1}
    result = fp.prune(tiny, EXAMPLE, method="dmc", budget="flops=0.5", data=loader(), **options)
    assert "proxy_accuracy" not in result.metrics["search"]


def test_a_method_class_and_a_budget_object(tiny: nn.Module) -> None:
    result = fp.prune(tiny, EXAMPLE, method=NoSearch, budget=Budget("flops", 0.5))
    assert result.metrics["search"] == {"answer": 42.0}
    assert result.plan.keep["conv1"] == list(range(5))  # 0.4 of 12


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "dmcc"}, ValueError, "did you mean 'dmc'"),
        ({"method": "l1", "nope": 3}, ValueError, "method 'l1' has no option 'nope'"),
        ({"method": "dmc", "data": 1, "epochs": "x"}, TypeError, "epochs 'x': type int is needed"),
        ({"method": "dmc"}, ValueError, "method 'dmc' searches on training data: give data="),
        ({"method": "l1", "budget": "flops=2"}, BudgetError, r"must be in \(0, 1\]"),
        ({"method": "l1", "budget": "flops=1"}, BudgetError, "nothing to prune"),
        (
            {"method": "l1", "budget": "flops=0.001"},
            BudgetError,
            "0.001 of the full network is asked for, but .* remains",
        ),
        ({"method": "l1", "resume": True, "out": None}, ValueError, "resume: give out="),
        ({"method": "l1", "resume": True, "out": "nowhere"}, RunError, "not a run directory"),
        ({"method": "l1", "device": "tpu"}, ValueError, "give auto, cpu, cuda or cuda:N"),
        ({"method": "l1", "precision": "fp16"}, ValueError, "give float32 or bf16"),
        ({"method": NoSearch, "keep": 1.0}, ValueError, "the plan removes nothing"),
        ({"method": NoSearch, "keep": 0.9}, BudgetError, "the method's plan costs .*, above the budget 'flops=0.5'"),
        ({"method": Stub}, ValueError, "reads training data, but no data were given"),
        ({"method": "dmc", "data": [(torch.zeros(4, 1, 16, 16), torch.zeros(4).long())]}, ValueError, "1 channels"),
        ({"method": "dmc", "data": []}, ValueError, "train data is empty"),
        ({"method": "dmc", "data": iter([])}, ValueError, "only once"),
    ],
)
def test_bad_input_leaves_no_trace(
    given: dict[str, Any],
    error: type[Exception],
    message: str,
    tiny: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.train()
    before = state_of(tiny)
    with pytest.raises(error, match=message):
        fp.prune(tiny, EXAMPLE, **{"budget": "flops=0.5", "out": "new/folder/run", **given})
    assert_unchanged(tiny, before)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_example_is_a_trace_error(tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="expected input"):
        fp.prune(tiny, torch.zeros(2, 1, 16, 16), method="l1", budget="flops=0.5", out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["setup", "step", "plan"])
def test_a_failing_method_removes_its_new_directory(place: str, tiny: nn.Module, tmp_path: Path) -> None:
    method, before = (NoSearch if place == "plan" else Stub), state_of(tiny)
    with pytest.raises(RuntimeError, match=f"failed in {place}"):
        fp.prune(tiny, EXAMPLE, method=method, data=loader(), out=tmp_path / "run", fail=place)
    assert_unchanged(tiny, before)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_of_the_user_stays(tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed in plan"):
        fp.prune(tiny, EXAMPLE, method=NoSearch, out=tmp_path, fail="plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_search_survives_a_failing_plan(log_every: int, tiny: nn.Module, tmp_path: Path) -> None:
    """Its checkpoints stay, with or without a line in the log."""
    out, loop = tmp_path / "run", LoopOptions(log_every=log_every, checkpoint_steps=1)
    with pytest.raises(RuntimeError, match="failed in plan"):
        fp.prune(tiny, EXAMPLE, method=Stub, data=loader(), out=out, loop=loop, fail="plan")
    newest = max(path.name for path in (out / "checkpoints" / "search").iterdir())
    assert newest == "step-000000016.safetensors"
    assert not (out / "plan.json").exists()


def test_resume_gives_the_same_bytes(tiny: nn.Module, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "method": "dmc", "budget": "flops=0.7", "loop": LoopOptions(log_every=1, checkpoint_steps=1), **SHORT,
    }  # fmt: skip
    fp.prune(tiny, EXAMPLE, data=loader(), out=tmp_path / "whole", **arguments)

    class Cut:
        """A loader that fails at the third batch of the second epoch."""

        def __init__(self) -> None:
            self.passes = -1  # the first look is for the shape

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.passes += 1
            for number, batch in enumerate(whole):
                if self.passes >= 3 and number == 2:
                    raise OSError("the disk is gone")
                yield batch

    whole = loader()
    with pytest.raises(OSError, match="the disk is gone"):
        fp.prune(tiny, EXAMPLE, data=Cut(), out=tmp_path / "cut", **arguments)
    steps = sorted(path.stem for path in (tmp_path / "cut" / "checkpoints" / "search").iterdir())
    assert steps
    assert steps[-1] < max(p.stem for p in (tmp_path / "whole" / "checkpoints" / "search").iterdir())
    fp.prune(tiny, EXAMPLE, data=loader(), out=tmp_path / "cut", resume=True, **arguments)
    for name in ("plan.json", "model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"budget": "flops=0.5"}, "begun with budget 'flops=0.7', not 'flops=0.5'"),
        ({"seed": 3}, "begun with seed 0, not 3"),
        ({"method": "l2"}, "begun with method 'l1', not 'l2'"),
        ({"ranking": "global"}, "begun with l1 "),
        ({"limits": fp.Limits(round_to=2)}, "begun with round_to 1, not 2"),
        ({"ignore": ["0"]}, r"begun with ignore \[\], not \['0'\]"),
        ({"rewrite": False}, "begun with keep_class False, not True"),
        ({"exact": False}, "begun with inexact False, not True"),
        ({"channels_last": True}, "begun with channels_last False, not True"),
        ({"limits": fp.Limits(keep_ratios={"*": (0.1, 1)})}, r"begun with keep_ratio \[\], not"),
    ],
)
def test_resume_refuses_another_search(other: dict[str, Any], message: str, tiny: nn.Module, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"method": "l1", "budget": "flops=0.7", "out": tmp_path / "run"}
    fp.prune(tiny, EXAMPLE, **arguments)
    plan = (tmp_path / "run" / "plan.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        fp.prune(tiny, EXAMPLE, resume=True, **{**arguments, **other})
    assert (tmp_path / "run" / "plan.json").read_bytes() == plan


@pytest.mark.parametrize("method", ["l1", "dmc"])
def test_resume_refuses_other_weights(method: str, tiny: nn.Module, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"method": method, "budget": "flops=0.7", "out": tmp_path / "run"}
    if method == "dmc":
        arguments |= {"data": loader(), **SHORT}
    fp.prune(tiny, EXAMPLE, **arguments)
    plan = (tmp_path / "run" / "plan.json").read_bytes()
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="was begun with other weights of the network; give the same network"):
        fp.prune(other, EXAMPLE, resume=True, **arguments)
    fp.prune(tiny, EXAMPLE, resume=True, **arguments)
    assert (tmp_path / "run" / "plan.json").read_bytes() == plan


def test_a_run_of_an_earlier_version_takes_any_weights(tiny: nn.Module, tmp_path: Path) -> None:
    """Its checkpoints hold no checksum, and get none of a network that may be the wrong one."""
    arguments: dict[str, Any] = {"method": "l1", "budget": "flops=0.7", "out": tmp_path / "run"}
    fp.prune(tiny, EXAMPLE, **arguments)
    (path,) = (tmp_path / "run" / "checkpoints" / "search").iterdir()
    state = load_state(path)
    assert state.pop("weights") is not None
    save_state(path, state)
    for factor in (2, 3):
        other = copy.deepcopy(tiny)
        next(other.parameters()).data.mul_(factor)
        fp.prune(other, EXAMPLE, resume=True, **arguments)
