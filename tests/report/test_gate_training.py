"""How gates train: what the figures of DMC and DDNP show, from the logs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastprune.methods.gates.ddnp import DDNP, DDNPConfig
from fastprune.methods.gates.dp import DP
from fastprune.report.gate_training import FORMULAS, cost_terms, distances_around, mask_edges, trainings
from fastprune.report.log import PruningRun

WriteRun = Callable[..., Path]

GATED = 0.8  # part of the cost next to gates, so that p = 1 − (1 − 0.6)/0.8 = 0.5 at a budget of 0.6
PLAN = {"stage": "plan", "search": {"gated_part": GATED, "flops_of_plan": 0.6}}


@pytest.mark.parametrize("variant", ["perturbed", "paper", "release"])
def test_runs_without_options_say_which_cost_term_they_had(variant: str) -> None:
    assert asdict(DDNP(DDNPConfig(variant=variant)).config)["resource"] in FORMULAS
    assert asdict(DP().config)["resource"] in FORMULAS


def search(**metrics: list[float]) -> list[dict[str, Any]]:
    count = max(map(len, metrics.values()))
    return [
        {"stage": "search", "phase": "gates", "epoch": n, "step": 10 * n + 10}
        | {name: values[n] for name, values in metrics.items() if n < len(values)}
        for n in range(count)
    ]


def read(write_run: WriteRun, name: str, records: list[dict[str, Any]], **settings: Any) -> PruningRun:
    return PruningRun.read(write_run(name, records, **({"budget": "flops=0.6"} | settings)), name)


def log_of(term: Callable[[float], float], *ratios: float) -> list[dict[str, Any]]:
    """Return the log of a search under R with these cost ratios of the layers with gates."""
    costs = [1 - GATED * (1 - ratio) for ratio in ratios]
    return [*search(flops_ratio=costs, regulariser=[term(ratio) for ratio in ratios]), PLAN]


def test_accuracy_beside_the_regulariser(write_run: WriteRun) -> None:
    both = read(write_run, "both", search(proxy_accuracy=[0.9, 0.5, 0.8], regulariser=[0.4, 0.1, 0.0]))
    without = read(write_run, "without", search(regulariser=[0.4, 0.1]))
    once = read(write_run, "once", search(proxy_accuracy=[0.9], regulariser=[0.4, 0.1]))
    (found,) = trainings([both, without, once])
    assert found.label == "dmc · both"
    assert found.accuracy == {1: 0.9, 2: 0.5, 3: 0.8}
    assert found.regulariser == {1: 0.4, 2: 0.1, 3: 0.0}


@pytest.mark.parametrize(
    ("settings", "kind", "value", "slopes"),
    [
        ({}, "log", lambda r: math.log(abs(r - 0.5) + 1), (-1 / 1.25, 1 / 1.25)),
        ({"method": "dp", "dp": {"resource": "one_sided"}}, "one_sided", lambda r: math.log(max(r, 0.5) / 0.5),
         (0, 1 / 0.75)),
        ({"method": "ddnp", "ddnp": {"resource": "two_sided"}}, "two_sided", lambda r: abs(math.log(r / 0.5)),
         (-1 / 0.25, 1 / 0.75)),
    ],
)  # fmt: skip
def test_the_search_lies_on_its_cost_term(
    settings: dict[str, Any], kind: str, value: Callable[[float], float], slopes: tuple[float, float],
    write_run: WriteRun,
) -> None:  # fmt: skip
    (term,) = cost_terms([read(write_run, "a", log_of(value, 1.0, 0.7, 0.45), **settings)])
    assert term.formula == FORMULAS[kind]
    assert term.target == pytest.approx(0.5)
    np.testing.assert_allclose([x for x, _ in term.points], [0.5, 0.2, -0.05], atol=1e-12)
    np.testing.assert_allclose(term.sample([x for x, _ in term.points])[0], [y for _, y in term.points], atol=1e-7)
    found, steep = term.sample([-0.25, math.nan, 0.25, -0.6])
    np.testing.assert_allclose(found, [value(0.25), math.nan, value(0.75), math.nan])
    np.testing.assert_allclose(steep, [slopes[0], math.nan, slopes[1], math.nan])


def test_equal_cost_terms_are_one(write_run: WriteRun) -> None:
    dmc = [
        read(write_run, "a", log_of(lambda r: math.log(abs(r - 0.5) + 1), 0.7)),
        read(write_run, "b", log_of(lambda r: math.log(abs(r - 0.25) + 1), 0.7), budget="flops=0.4"),
    ]
    one_sided = {"method": "dp", "dp": {"resource": "one_sided"}}
    dp = [
        read(write_run, "c", log_of(lambda r: math.log(r / 0.5), 0.7), **one_sided),
        read(write_run, "d", log_of(lambda r: math.log(r / 0.25), 0.7), budget="flops=0.4", **one_sided),
    ]
    terms = cost_terms([*dmc, *dp])
    assert [(term.depends_on_target, round(term.target, 3), len(term.points)) for term in terms] == [
        (False, 0.5, 2), (True, 0.5, 1), (True, 0.25, 1),
    ]  # fmt: skip
    places = distances_around(terms)
    assert (places[0], places[-1]) == (pytest.approx(-0.3), pytest.approx(0.75))
    assert 0 not in places  # the slope jumps there
    assert sum(map(math.isnan, places)) == 1


def test_a_run_that_does_not_say_where_its_target_is_has_no_cost_term(write_run: WriteRun) -> None:
    records = search(flops_ratio=[1.0, 0.7], regulariser=[0.4, 0.2])
    earlier = read(write_run, "earlier", [*records, {"stage": "plan", "search": {"flops_of_plan": 0.6}}])
    unfinished = read(write_run, "unfinished", records, kept=None)
    other = read(write_run, "other", [*records, PLAN], method="sanp", sanp={})
    assert cost_terms([earlier, unfinished, other]) == []


def test_the_mask_of_the_largest_group(write_run: WriteRun) -> None:
    records = search(**{"keep/conv1": [1.0, 0.5], "keep/conv2": [1.0, 0.5]})
    ddnp = {"method": "ddnp", "ddnp": {"window": 0.34, "variant": "paper"}}
    run = read(write_run, "soft", records, **ddnp)
    (edge,) = mask_edges([run, read(write_run, "same", records, seed=1, **ddnp)])
    assert edge.title == "ddnp · soft: conv2"
    assert (edge.size, edge.centre, edge.window) == (6, 3.0, 2.0)  # γ = round(0.34 · 6)

    def formula(rank: float) -> float:  # eq. 7, mirrored, centred on Ck + ½
        t = min(max((3 - (rank - 0.5)) / 2, -0.5), 0.5)
        return -2 * t**3 + 1.5 * t + 0.5

    np.testing.assert_allclose(edge.values, [formula(rank) for rank in range(1, 7)])
    assert edge.values[:2] == [1, 1]
    assert 0.5 < edge.values[2] < 1
    np.testing.assert_allclose(edge.function, [formula(rank) for rank in edge.ranks])
    assert (edge.ranks[0], edge.ranks[-1]) == (pytest.approx(0.525), pytest.approx(6.475))


def test_masks_without_an_edge(write_run: WriteRun) -> None:
    records = search(**{"keep/conv2": [1.0, 0.5]})
    hard = read(write_run, "hard", records, method="ddnp", ddnp={"window": 0.0})
    (edge,) = mask_edges([hard])
    assert edge.values == [1, 1, 1, 0, 0, 0]
    assert set(edge.function) == {0, 1}
    others = [
        read(write_run, "dmc", records),
        read(write_run, "release", records, method="ddnp", ddnp={"window": 0.1, "variant": "release"}),
        read(write_run, "unfinished", records, kept=None, method="ddnp", ddnp={"window": 0.1}),
        read(write_run, "without", search(loss=[1.0]), method="ddnp", ddnp={"window": 0.1}),
    ]
    assert mask_edges(others) == []
