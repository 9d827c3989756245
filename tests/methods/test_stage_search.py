"""SP's search: quotas hold, nothing is measured twice, and a search can be interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.engine.checkpoint import load_state, save_state
from fastprune.methods.sp.evolution import Evolution, EvolutionSettings, Gene
from fastprune.methods.sp.spaces import QuotaSpace, StageWidths, WidthSpace
from fastprune.methods.sp.stage_search import PASSES, PassResult, StageSearch
from fastprune.methods.sp.widths import Widths

SETTINGS = EvolutionSettings(population=12, iterations=4, mutation=0.2, parents=4)
WIDTHS = tuple(range(2, 33, 2))
PRICES = (1.0, 3.0, 0.5)  # of a channel, by stage


def stage_widths(price: float, groups: int = 3) -> StageWidths:
    def cost(widths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return price * (widths.sum(1) - 2.0 * groups)

    return StageWidths((WIDTHS,) * groups, cost)


def stages() -> list[StageWidths]:
    return [stage_widths(price) for price in PRICES]


class Losses:
    """Losses that fall with the widths, most with that of the first group; records the queries."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Widths]] = []

    def __call__(self, queries: Sequence[tuple[int, Widths]]) -> list[float]:
        self.asked += queries
        return [sum((place + 1) / width for place, width in enumerate(reversed(widths))) for _, widths in queries]


def make_search(total: float = 120.0, *, interaction: float = 0.0, **options: Any) -> tuple[StageSearch, Losses]:
    """Make a search whose network costs 1 + ``interaction`` times its stages together."""
    measure, parts = Losses(), stages()

    def exact_cost(widths: Sequence[Widths]) -> float:
        costs = [float(part.cost(np.array([w]))[0]) for part, w in zip(parts, widths, strict=True)]
        return (1 + interaction) * sum(costs)

    options = {"settings": SETTINGS, "levels": 9, **options}
    return StageSearch(parts, total, exact_cost, 2.0, measure, **options), measure


def finish(search: StageSearch) -> StageSearch:
    while not search.finished:
        search.run_round()
    return search


@given(
    genes=st.lists(st.lists(st.integers(0, 15), min_size=3, max_size=3), min_size=1, max_size=8),
    quota=st.floats(0, 100),
)
def test_repaired_widths_meet_their_quota(genes: list[list[int]], quota: float) -> None:
    space = WidthSpace(stage_widths(1.0), quota)
    before, repaired = np.array(genes), space.repair(np.array(genes), np.random.default_rng(0))
    costs = space.stage.costs(repaired)
    assert (costs <= quota).all()
    unchanged = space.stage.costs(before) <= quota
    assert (repaired[unchanged] == before[unchanged]).all()
    assert (repaired <= before).all()


@given(genes=st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=1), total=st.floats(0, 500))
def test_repaired_quotas_fill_the_total_to_one_level(genes: list[list[int]], total: float) -> None:
    space = QuotaSpace(np.array([stage.full_cost for stage in stages()]), 9, total)
    for gene in space.repair(np.array(genes), np.random.default_rng(0)):
        quotas = space.quotas(gene)
        assert quotas.sum() <= total * (1 + 1e-12)
        rising = quotas[gene < 8]
        steps = (space.full_costs / 8)[gene < 8]
        assert not len(rising) or total - quotas.sum() < steps.min() * (1 + 1e-9)


def test_an_evolution_keeps_the_best_and_repeats_nothing() -> None:
    space = WidthSpace(stage_widths(1.0), 40.0)
    evolution, best, seen = Evolution(space, SETTINGS, (0, 1)), [], set()
    while not evolution.finished:
        genes = evolution.ask()
        assert genes == evolution.ask()
        assert len(genes) == len(set(genes)) == SETTINGS.population
        assert not seen & set(genes)
        seen |= set(genes)
        evolution.tell({gene: float(sum((gene[0] - 9) ** 2 + g for g in gene)) for gene in genes})
        best.append(evolution.best[1])
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]


def test_a_small_space_is_searched_completely() -> None:
    space = WidthSpace(StageWidths(((1, 2), (1, 2)), lambda widths: widths.sum(1) - 2.0), 9.0)
    evolution = Evolution(space, SETTINGS, (0,))
    while not evolution.finished:
        evolution.tell({gene: -float(sum(gene)) for gene in evolution.ask()})
    assert len(evolution.losses) == 4
    assert evolution.best == ((1, 1), -2.0)


def test_nan_is_the_worst_loss() -> None:
    evolution = Evolution(WidthSpace(stage_widths(1.0), 40.0), SETTINGS, (0,))
    genes = evolution.ask()
    evolution.tell({gene: float("nan") if gene != genes[5] else 1e9 for gene in genes})
    assert evolution.best == (genes[5], 1e9)


@pytest.mark.slow
def test_the_search_beats_equal_widths() -> None:
    search, _ = make_search(settings=EvolutionSettings(32, 8, 0.1, 8), levels=17)
    finish(search)
    widths = search.best
    costs = [float(part.cost(np.array([w]))[0]) for part, w in zip(stages(), widths, strict=True)]
    assert sum(costs) <= 120.0
    measure = Losses()
    uniform: Widths = (2 + round(120 / sum(PRICES) / 3),) * 3
    assert sum(measure(list(enumerate(widths)))) < 0.97 * sum(measure([(stage, uniform) for stage in range(3)]))
    assert np.mean([w[-1] for w in widths]) < np.mean([w[0] for w in widths])  # the first group matters most


def test_memoising_does_not_change_the_result() -> None:
    known, asked = make_search(memoise=True)
    repeated, asked_repeatedly = make_search(memoise=False)
    assert finish(known).best == finish(repeated).best
    assert known.passes == repeated.passes
    assert len(asked.asked) == len(set(asked.asked)) == known.measured
    assert len(asked_repeatedly.asked) > len(asked.asked)
    assert known.metrics()["measured_literally"] > 10 * known.measured


@pytest.mark.parametrize("concurrent", [1, 3, 100])
def test_concurrency_does_not_change_the_result(concurrent: int) -> None:
    assert finish(make_search(concurrent=concurrent)[0]).best == finish(make_search()[0]).best


@pytest.mark.parametrize("interaction", [0.3, -0.2])
def test_quotas_are_corrected_by_the_cost_of_the_network(interaction: float) -> None:
    """The network costs more, or less, than its stages together."""
    search, _ = make_search(interaction=interaction)
    finish(search)
    assert 1 < len(search.limits) <= PASSES
    first, last = search.passes[0].cost, search.passes[-1].cost
    assert abs(120.0 - last) < abs(120.0 - first)
    costs = [float(part.cost(np.array([w]))[0]) for part, w in zip(stages(), search.best, strict=True)]
    if any(result.cost <= 120.0 for result in search.passes):
        assert (1 + interaction) * sum(costs) <= 120.0


@pytest.mark.parametrize("total", [-3.0, 0.0])
def test_below_their_cost_the_smallest_widths_are_the_result(total: float) -> None:
    search = finish(make_search(total)[0])
    assert search.best == [(2, 2, 2)] * 3
    assert search.passes == [PassResult(search.metrics()["proxy_loss"], 0.0, [(0, 0, 0)] * 3)]


def test_if_every_network_costs_too_much_the_cheapest_wins() -> None:
    """The cost of the network hardly depends on the quotas."""
    search = finish(make_search()[0])
    genes: list[Gene] = [(0, 0, 0)] * 3
    search.passes = [PassResult(1.0, 140.0, genes), PassResult(2.0, 121.0, genes), PassResult(1.5, 125.0, genes)]
    assert search.best_pass.loss == 2.0
    search.passes.append(PassResult(9.0, 119.0, genes))
    assert search.best_pass.loss == 9.0


def test_a_larger_quota_is_not_worse() -> None:
    """Results under a smaller quota also meet a larger one."""
    search = finish(make_search()[0])
    for stage in range(3):
        levels = sorted(level for number, level in search.found if number == stage)
        losses = [search.best_result(stage, level).loss for level in levels]
        assert losses == sorted(losses, reverse=True)
        assert all(search.best_result(stage, n).loss <= search.found[stage, n].loss for n in levels)


@pytest.mark.parametrize("rounds", [1, 5, 17])
def test_a_saved_search_resumes(rounds: int, tmp_path: Path) -> None:
    whole = finish(make_search(interaction=0.3)[0])
    begun, first = make_search(interaction=0.3)
    for _ in range(rounds):
        begun.run_round()
    assert not begun.finished
    save_state(tmp_path / "state.safetensors", begun.state_dict())
    resumed, second = make_search(interaction=0.3)
    resumed.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert resumed.progress() == begun.progress()
    assert finish(resumed).best == whole.best
    assert resumed.passes == whole.passes
    assert resumed.metrics() == whole.metrics()
    assert not set(first.asked) & set(second.asked)


def test_progress_rises_and_ends_with_the_search() -> None:
    search, _ = make_search(interaction=0.3)
    before = -1
    while not search.finished:
        done, total = search.progress()
        assert before <= done < total
        before = done
        search.run_round()
    done, total = search.progress()
    assert done == total
