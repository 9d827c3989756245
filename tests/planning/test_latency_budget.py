"""Budgets of latency. Where values matter, time is a fixed function of shapes: nothing depends on noise."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch

import fastprune as fp
from fastprune import job
from fastprune.cli.main import main
from fastprune.graph.latency import timing as latency
from fastprune.graph.latency.calls import Call
from fastprune.graph.latency.stopwatch import Stopwatch
from fastprune.host.distributed import Distributed
from fastprune.methods import registry
from fastprune.planning.budget import Budget, BudgetError
from fastprune.planning.fitting import fit, longest_prefix, rank

EXAMPLE = torch.zeros(1, 3, 32, 32)


def fixed_times(calls: Sequence[Call]) -> list[float]:
    """Return seconds that grow with the sizes of all inputs of an operator."""
    return [1e-6 * (1 + sum(torch.Size(shape).numel() for shape in call.shapes) / 1e3) for call in calls]


@pytest.fixture(autouse=True)
def fix_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Stopwatch, "__init__", with_fixed_times(Stopwatch.__init__))
    monkeypatch.setattr(latency, "module_call_ms", lambda: 0.001)
    monkeypatch.setattr(job, "CLOSE", float("inf"))  # the networks themselves take other times


def with_fixed_times(initialise: Any) -> Any:
    def init(self: Stopwatch, device: torch.device, footprint: int, timer: Any = None) -> None:
        initialise(self, device, footprint, timer or fixed_times)

    return init


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return fp.models.create("resnet20").eval()


@pytest.mark.parametrize("part", [pytest.param(0.8, marks=pytest.mark.slow), 0.6])
@pytest.mark.parametrize(
    ("method", "options"), [("l1", {}), ("l2", {"ranking": "global"}), ("uniform", {}), ("random", {})]
)
def test_fractions_are_met_from_below(
    method: str, options: dict[str, Any], part: float, model: torch.nn.Module
) -> None:
    result = fp.prune(model, EXAMPLE, method=method, budget=f"latency={part}", **options)
    ms = result.metrics["ms"]
    assert part - 0.02 < ms["planned"] / ms["full"] <= part
    own = result.graph.latency(batch=1)
    assert ms["planned"] == pytest.approx(float(own(result.plan.mask)))
    assert result.metrics["measured_ms"]["planned"] > 0


def test_milliseconds_are_met(model: torch.nn.Module) -> None:
    full = float(fp.trace(model, EXAMPLE).latency()(torch.ones(352)))
    result = fp.prune(
        model, EXAMPLE, method="l1", budget=f"latency={0.7 * full * 1000:.1f}us", limits=fp.Limits(round_to=4)
    )
    assert result.metrics["ms"]["full"] == pytest.approx(full)
    assert 0.66 * full < result.metrics["ms"]["planned"] <= 0.7 * full
    assert all(kept % 4 == 0 for kept, _ in result.plan.widths.values())


@pytest.mark.parametrize("budget", ["latency=0.7", "latency={}us"])
@pytest.mark.parametrize("share", [0.6, -0.1])
def test_a_plan_is_corrected_where_the_measured_latency_misses_the_budget(
    budget: str, share: float, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = float(fp.trace(model, EXAMPLE).latency()(torch.ones(352)))

    def measure(conditions: fp.Conditions, graph: Any, networks: dict[str, torch.nn.Module]) -> Any:
        """Return times of which a part does not depend on the widths, above or below what is modelled."""
        parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
        part = parameters["planned"] / parameters["full"]
        assert conditions.batch == 1
        return {"measured_ms": {"full": full, "planned": full * (share + (1 - share) * part)}, "measured_on": {}}

    text = budget.format(0.7 * full * 1000)
    monkeypatch.setattr(job, "measure", measure)
    missed = fp.prune(model, EXAMPLE, method="l1", budget=text).metrics["measured_ms"]
    monkeypatch.setattr(job, "CLOSE", 0.03)
    result = fp.prune(model, EXAMPLE, method="l1", budget=text)
    over, *later = result.metrics["correction"]
    assert over == pytest.approx(missed["planned"] / (0.7 * full), abs=1e-3)
    assert abs(over - 1) > 0.03
    assert later
    assert abs(result.metrics["measured_ms"]["planned"] / (0.7 * full) - 1) <= 0.03
    kept = fp.prune(model, EXAMPLE, method="l1", budget=text, conditions=fp.Conditions(modelled=True))
    assert kept.metrics["measured_ms"] == missed
    assert "correction" not in kept.metrics


def test_a_correction_that_is_out_of_reach_leaves_the_plan(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CLOSE", 0.03)
    monkeypatch.setattr(job, "measure", lambda *arguments: {"measured_ms": {"full": 1.0, "planned": 7.0}})
    result = fp.prune(model, EXAMPLE, method="l1", budget="latency=0.7")
    assert result.metrics["correction"] == [10.0]


class Telling(registry.load("l1")):  # type: ignore[misc]
    """L1, which tells how many units its last plan keeps."""

    def plan(self, task: Any) -> Any:
        self.planned = super().plan(task)
        return self.planned

    def results(self) -> dict[str, float]:
        return {"kept": float(self.planned.mask.sum())}


@pytest.mark.parametrize("times", [[7.0], [1.0, 0.2, 0.2]])
def test_a_method_tells_of_the_plan_that_is_kept(
    times: list[float], model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = iter([*times, 1.0])  # the last one is for the report
    monkeypatch.setattr(job, "CLOSE", 0.03)
    monkeypatch.setattr(job, "measure", lambda *given: {"measured_ms": {"full": 1.0, "planned": next(planned)}})
    result = fp.prune(model, EXAMPLE, method=Telling, budget="latency=0.7")
    assert len(result.metrics["correction"]) == len(times)
    assert result.metrics["search"]["kept"] == float(result.plan.mask.sum())


def test_networks_that_cannot_be_timed_are_kept(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(job, "measure", fail)
    with pytest.raises(RuntimeError, match="no such kernel"):  # of the report's own measurement, once all is saved
        fp.prune(model, EXAMPLE, method="l1", budget="latency=0.7", out=tmp_path / "run")
    assert fp.load(tmp_path / "run", model=model)(EXAMPLE).shape == (1, 10)


def test_steps_count_modelled_times(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CLOSE", 0.03)
    monkeypatch.setattr(job, "measure", lambda *arguments: {"measured_ms": {"full": 100.0, "planned": 90.0}})
    results = list(fp.prune_in_steps(model, EXAMPLE, steps=2, budget="latency=0.7", method="l1"))
    assert len(results) == 2
    assert not any("correction" in result.metrics for result in results)


def test_conditions_are_passed_on(model: torch.nn.Module) -> None:
    conditions = fp.Conditions(batch=4, dtype="bfloat16", channels_last=True)
    result = fp.prune(model, EXAMPLE, method="l1", budget="latency=0.7", conditions=conditions)
    (found,) = result.graph._latencies.values()
    assert (found.batch, found.dtype, found.channels_last) == (4, torch.bfloat16, True)


def test_gate_training_under_a_budget_of_latency() -> None:
    method = registry.load("dmc")
    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 16, 16), torch.randint(4, (8,))) for _ in range(2)]
    model = fp.models.create("resnet20", num_classes=4).eval()
    result = fp.prune(
        model, torch.zeros(1, 3, 16, 16), method=method, budget="latency=0.8", data=data,
        epochs=2, samples=16, batch_size=8, evaluate_every=0,
    )  # fmt: skip
    assert 0.75 < result.metrics["ms"]["planned"] / result.metrics["ms"]["full"] <= 0.8
    assert 0 < result.metrics["search"]["latency_ratio"] <= 1


def test_out_of_reach_and_nothing_to_prune(model: torch.nn.Module) -> None:
    graph = fp.trace(model, EXAMPLE)
    with pytest.raises(BudgetError, match=r"'latency=0\.01': 0\.010 of the full network .* 0\.\d+ remains"):
        fit(graph, Budget.parse("latency=0.01"), torch.zeros(graph.num_units))
    with pytest.raises(BudgetError, match=r"'latency=1e\+06ms': the full network costs \d\.\d{3} ms"):
        Budget.parse("latency=1000s").limit(graph)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"prune --model resnet20 --input 3x16x16 --method l1 --budget latency=0.7 --out {tmp_path}/run"
    assert main(shlex.split(f"{line} --latency_batch 2 --json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.68 < found["compact"]["ms"] / found["baseline"]["ms"] <= 0.7
    assert {"measured_ms", "macs"} <= found["compact"].keys()


@pytest.mark.slow
def test_times_are_copied_with_all_their_digits(model: torch.nn.Module) -> None:
    graph = fp.trace(model, EXAMPLE)
    ours = graph.latency(cache=False)
    theirs = latency.measure(
        graph, torch.device("cpu"), 1, torch.float32, cache=False, timer=latency.time_nothing, call_ms=0.0
    )
    mask = torch.rand(graph.num_units, dtype=torch.float64)
    assert float(theirs(mask)) == 0
    assert float(theirs.with_times(ours.times())(mask)) == float(ours(mask))


PROCESSES = """
import sys, torch, fastprune as fp
from fastprune.host.distributed import Distributed
from fastprune.graph.latency import timing as latency
from fastprune.graph.latency.stopwatch import Stopwatch

peers = Distributed.from_environment()
graph = fp.trace(fp.models.create("resnet20"), torch.zeros(1, 3, 16, 16))
# Real times, which differ from process to process.
model = graph.latency(cache=False, peers=peers)
value = torch.tensor([float(model(torch.ones(graph.num_units)))], dtype=torch.float64)
total = peers.sum_(value.clone())
assert float(value) > 0
assert float(total) == 2 * float(value), (total, value)
Distributed.leave()
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_process_has_nothing_to_agree_on(model: torch.nn.Module) -> None:
    graph = fp.trace(model, EXAMPLE)
    assert graph.latency(peers=Distributed()) is graph.latency()


class Jagged:
    """A meter that does not grow with every unit: an odd width costs as much as four units more."""

    def __init__(self, graph: fp.ChannelGraph) -> None:
        self.model = graph.cost_model

    def __call__(self, mask: torch.Tensor) -> torch.Tensor:
        return self.of_widths(self.model.kept(mask))

    def of_widths(self, kept: torch.Tensor) -> torch.Tensor:
        return (kept + 4 * (kept % 2)).sum(-1)


def test_the_longest_prefix_is_found_where_times_do_not_grow(model: torch.nn.Module) -> None:
    graph = fp.trace(model, EXAMPLE)
    scores = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = rank(graph, fp.Limits().widths(graph), scores, *torch.tensor([[True], [False]]).expand(2, graph.num_units))
    meter = Jagged(graph)
    costs = [float(meter(order.of_unit < count)) for count in range(len(order.sizes) + 1)]
    assert any(a > b for a, b in pairwise(costs))
    for limit in (min(costs), 100.0, 151.0, 203.0, 300.0):
        expected = max((count for count, cost in enumerate(costs) if cost <= limit), default=None)
        assert longest_prefix(graph, meter, order, limit, grows=False) == expected
    assert longest_prefix(graph, meter, order, min(costs) - 1, grows=False) is None


def test_conditions_without_a_latency_are_refused(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"latency budgets only; got 'flops=0\.5'"):
        fp.prune(model, EXAMPLE, method="l1", budget="flops=0.5", conditions=fp.Conditions(batch=8))
    with pytest.raises(ValueError, match="latency budgets only"):
        next(fp.prune_in_steps(model, EXAMPLE, steps=2, method="l1", conditions=fp.Conditions(batch=8)))


@pytest.mark.slow
def test_steps_use_the_times_of_the_first_network(model: torch.nn.Module) -> None:
    results = list(fp.prune_in_steps(model, EXAMPLE, steps=3, budget="latency=0.7", method="l1", device="auto"))
    own = fp.trace(model, EXAMPLE).latency()
    left = float(own(results[-1].plan.mask)) / float(own(torch.ones(352)))
    assert 0.66 < left <= 0.7
