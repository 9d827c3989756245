"""What results, plans and graphs say of themselves, and what is left of them after pickling."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.graph.layer_widths import layer_widths
from fastprune.host.wording import milliseconds
from fastprune.result import accuracy_facts, latency_facts


@pytest.fixture(scope="module")
def result() -> fp.PruningResult:
    torch.manual_seed(0)
    return fp.prune(fp.models.create("resnet20"), torch.zeros(1, 3, 8, 8), method="l1", budget="flops=0.5")


def test_a_result_says_what_was_gained(result: fp.PruningResult) -> None:
    lines = repr(result).splitlines()
    assert lines[0] == "PruningResult: ResNet, method l1, budget flops=0.5"
    assert 5 <= len(lines) <= 12
    (macs,) = (line for line in lines if line.split()[0] == "MACs")
    full, planned = result.plan.macs
    assert macs.endswith(f"({100 * planned / full:.1f} %)")
    times = result.metrics["measured_ms"]
    assert times["full"] > 0
    assert any("latency" in line and milliseconds(times["planned"]) in line for line in lines)
    assert result.metrics["measured_on"] | {"name": ""} == {"device": "cpu", "name": "", "threads": 1, "batch": 2}


@pytest.mark.parametrize("what", ["result", "plan", "graph"])
def test_short_in_text_and_in_notebooks(what: str, result: fp.PruningResult) -> None:
    value: Any = result if what == "result" else getattr(result, what)
    assert 5 <= len(repr(value).splitlines()) <= 12
    assert max(map(len, repr(value).splitlines())) <= 100
    page = value._repr_html_()
    assert page.startswith("<table>")
    assert page.count("<tr>") >= 5


def test_the_summary_has_every_group_and_layer(result: fp.PruningResult) -> None:
    text = result.summary()
    assert text.startswith(repr(result))
    for name, (kept, size) in result.plan.widths.items():
        assert any(line.split()[:4] == [name, str(kept), "of", str(size)] for line in text.splitlines())
    for layer in result.graph.layers:
        assert f"\n{layer.name} " in text


def test_layer_widths_are_those_of_the_compact_network(result: fp.PruningResult) -> None:
    rows = layer_widths(result.graph, result.plan.mask)
    modules = dict(result.model.named_modules())
    for row in rows:
        weight: Any = modules[row.layer].weight
        assert row.channels[1] == weight.shape[0]
        assert row.params[1] == weight.numel()
    for place in (0, 1):
        assert sum(row.macs[place] for row in rows) == result.plan.macs[place]
    made = result.plan.layers
    assert {row.layer: row.channels[::-1] for row in rows if row.layer in made} == made
    assert made.keys() == {row.layer for row in rows} - {"fc"}


def test_layers_of_a_step_are_left_out(tiny: nn.Module) -> None:
    first, last = fp.prune_in_steps(tiny, torch.zeros(1, 3, 16, 16), steps=2, method="l1", budget="flops=0.4")
    assert "conv2d" in first.summary()
    assert "conv2d" not in last.summary()  # its graph is that of the network between the steps
    assert str(last.plan.widths["conv1"][0]) in last.summary()


def pickled(value: Any, way: str) -> Any:
    if way == "pickle":
        return pickle.loads(pickle.dumps(value))
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_results_can_be_pickled(way: str, result: fp.PruningResult) -> None:
    result.graph.latency("cpu", batch=2, cache=False)  # operators of torch, which cannot be pickled
    again = pickled(result, way)
    assert repr(again) == repr(result)
    assert again.summary() == result.summary()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again.model(x), result.model(x), rtol=0, atol=0)
    assert again.graph.plan(again.plan.mask).keep == result.plan.keep
    with pytest.raises(fp.TraceError, match=r"operator graphs were left out; trace the model again: fastprune\.trace"):
        again.graph.latency("cpu")
    assert not hasattr(again.graph.traced, "nope")


def test_a_copy_of_a_graph_keeps_its_operators(result: fp.PruningResult) -> None:
    graph = copy.deepcopy(result.graph)
    assert graph.traced.evaluation is not result.graph.traced.evaluation
    x = torch.zeros(2, 3, 8, 8)
    torch.testing.assert_close(graph.traced.evaluation(x), result.graph.traced.evaluation(x))


def test_facts_that_are_known_only() -> None:
    assert latency_facts({}) == accuracy_facts({}) == []
    assert accuracy_facts({"search": {"proxy_accuracy": 0.5}}) == [
        ("accuracy", "50.0 % on held-out data, before fine-tuning")
    ]
    facts = dict(latency_facts({"measured_ms": {"full": 3, "planned": 2}, "ms": {"full": 4, "planned": 1}}))
    assert facts == {"latency": "3.00 ms → 2.00 ms (1.50× faster)",
                     "modelled": "4.00 ms → 1.00 ms, as the budget counts it"}  # fmt: skip


def test_a_network_that_cannot_be_timed_is_pruned(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("fastprune.job.time_calls", fail)
    result = fp.prune(tiny, torch.zeros(1, 3, 16, 16), method="l1", budget="flops=0.5")
    assert "measured_ms" not in result.metrics
    assert "latency" not in repr(result)
