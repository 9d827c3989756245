"""SP's search: quotas are kept, nothing is measured twice, and all of it can be interrupted."""

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
from fastprune.methods.sp.evolution import Evolution, EvolutionSettings
from fastprune.methods.sp.stage_search import PASSES, QuotaSpace, StageSearch, StageWidths, Widths, WidthSpace

SETTINGS = EvolutionSettings(population=12, iterations=4, mutation=0.2, parents=4)
WIDTHS = tuple(range(2, 33, 2))
PRICES = (1.0, 3.0, 0.5)  # of a channel, by stage


def stage_widths(price: float, groups: int = 3) -> StageWidths:
    def cost(widths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return price * (widths.sum(1) - 2.0 * groups)

    return StageWidths((WIDTHS,) * groups, cost)


def stages() -> list[StageWidths]:
    return [stage_widths(price) for price in PRICES]


class Measured:
    """Losses that fall with the widths, of the first group most; what was asked for is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Widths]] = []

    def __call__(self, queries: Sequence[tuple[int, Widths]]) -> list[float]:
        self.asked += queries
        return [sum((place + 1) / width for place, width in enumerate(reversed(widths))) for _, widths in queries]


def searched(total: float = 120.0, *, interaction: float = 0.0, **options: Any) -> tuple[StageSearch, Measured]:
    """A search whose network costs ``interaction`` times more than its stages together."""
    measure, parts = Measured(), stages()

    def exact(widths: Sequence[Widths]) -> float:
        costs = [float(part.cost(np.array([w]))[0]) for part, w in zip(parts, widths, strict=True)]
        return (1 + interaction) * sum(costs)

    options = {"settings": SETTINGS, "levels": 9, **options}
    return StageSearch(parts, total, exact, 2.0, measure, **options), measure


def finish(search: StageSearch) -> StageSearch:
    while not search.finished:
        search.round()
    return search


@given(
    genes=st.lists(st.lists(st.integers(0, 15), min_size=3, max_size=3), min_size=1, max_size=8),
    quota=st.floats(0, 100),
)
def test_widths_are_within_their_quota(genes: list[list[int]], quota: float) -> None:
    space = WidthSpace(stage_widths(1.0), quota)
    given_, within = np.array(genes), space.within(np.array(genes), np.random.default_rng(0))
    costs = space.stage.costs(within)
    assert (costs <= quota).all()
    unchanged = space.stage.costs(given_) <= quota
    assert (within[unchanged] == given_[unchanged]).all()
    assert (within <= given_).all()


@given(genes=st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=1), total=st.floats(0, 500))
def test_quotas_are_the_total_to_one_level(genes: list[list[int]], total: float) -> None:
    space = QuotaSpace(np.array([stage.most for stage in stages()]), 9, total)
    within = space.within(np.array(genes), np.random.default_rng(0))
    for gene in within:
        quotas = space.quotas(gene)
        assert quotas.sum() <= total * (1 + 1e-12)
        rising = quotas[gene < 8]
        steps = (space.most / 8)[gene < 8]
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


def test_a_small_space_is_searched_whole() -> None:
    space = WidthSpace(StageWidths(((1, 2), (1, 2)), lambda widths: widths.sum(1) - 2.0), 9.0)
    evolution = Evolution(space, SETTINGS, (0,))
    while not evolution.finished:
        evolution.tell({gene: -float(sum(gene)) for gene in evolution.ask()})
    assert len(evolution.losses) == 4
    assert evolution.best == ((1, 1), -2.0)


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    evolution = Evolution(WidthSpace(stage_widths(1.0), 40.0), SETTINGS, (0,))
    genes = evolution.ask()
    evolution.tell({gene: float("nan") if gene != genes[5] else 1e9 for gene in genes})
    assert evolution.best == (genes[5], 1e9)


@pytest.mark.slow
def test_the_search_finds_what_is_nearly_best_and_is_better_than_equal_widths() -> None:
    search, _ = searched(settings=EvolutionSettings(32, 8, 0.1, 8), levels=17)
    finish(search)
    widths = search.best
    costs = [float(part.cost(np.array([w]))[0]) for part, w in zip(stages(), widths, strict=True)]
    assert sum(costs) <= 120.0
    measure = Measured()
    uniform: Widths = (2 + round(120 / sum(PRICES) / 3),) * 3
    assert sum(measure(list(enumerate(widths)))) < 0.97 * sum(measure([(stage, uniform) for stage in range(3)]))
    assert np.mean([w[-1] for w in widths]) < np.mean([w[0] for w in widths])  # the weight of the places


def test_memoised_and_not_find_the_same() -> None:
    known, asked = searched(memoise=True)
    anew, asked_anew = searched(memoise=False)
    assert finish(known).best == finish(anew).best
    assert known.results == anew.results
    assert len(asked.asked) == len(set(asked.asked)) == known.measured
    assert len(asked_anew.asked) > len(asked.asked)
    assert known.metrics()["measured_literally"] > 10 * known.measured


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_how_many_run_beside_each_other_changes_nothing(at_once: int) -> None:
    assert finish(searched(at_once=at_once)[0]).best == finish(searched()[0]).best


@pytest.mark.parametrize("interaction", [0.3, -0.2])
def test_quotas_are_corrected_by_what_the_network_costs(interaction: float) -> None:
    """A network that costs more, or less, than its stages together."""
    search, _ = searched(interaction=interaction)
    finish(search)
    assert 1 < len(search.limits) <= PASSES
    first, last = search.results[0][1], search.results[-1][1]
    assert abs(120.0 - last) < abs(120.0 - first)
    chosen = [float(part.cost(np.array([w]))[0]) for part, w in zip(stages(), search.best, strict=True)]
    if any(cost <= 120.0 for _, cost, _ in search.results):
        assert (1 + interaction) * sum(chosen) <= 120.0


@pytest.mark.parametrize("total", [-3.0, 0.0])
def test_below_the_smallest_widths_these_are_the_result(total: float) -> None:
    search = finish(searched(total)[0])
    assert search.best == [(2, 2, 2)] * 3
    assert search.results == [(search.metrics()["distillation_loss"], 0.0, [(0, 0, 0)] * 3)]


def test_where_every_network_costs_too_much_the_cheapest_is_chosen() -> None:
    """A network that costs the same however small the quotas are."""
    search = finish(searched()[0])
    search.results = [(1.0, 140.0, [(3, 0, 0)] * 3), (2.0, 121.0, [(1, 0, 0)] * 3), (1.5, 125.0, [(2, 0, 0)] * 3)]
    assert search.chosen[0] == 2.0
    search.results.append((9.0, 119.0, [(0, 0, 0)] * 3))
    assert search.chosen[0] == 9.0


def test_more_may_not_be_worse() -> None:
    """What was found under a smaller quota is within a larger one, too."""
    search = finish(searched()[0])
    for stage in range(3):
        levels = sorted(level for of, level in search.found if of == stage)
        losses = [search.least(stage, level).loss for level in levels]
        assert losses == sorted(losses, reverse=True)
        assert all(search.least(stage, n).loss <= search.found[stage, n].loss for n in levels)


@pytest.mark.parametrize("rounds", [1, 5, 17])
def test_it_goes_on_where_it_was(rounds: int, tmp_path: Path) -> None:
    whole = finish(searched(interaction=0.3)[0])
    begun, first = searched(interaction=0.3)
    for _ in range(rounds):
        begun.round()
    assert not begun.finished
    save_state(tmp_path / "state.safetensors", begun.state_dict())
    resumed, second = searched(interaction=0.3)
    resumed.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert resumed.progress() == begun.progress()
    assert finish(resumed).best == whole.best
    assert resumed.results == whole.results
    assert resumed.metrics() == whole.metrics()
    assert not set(first.asked) & set(second.asked)


def test_progress_ends_where_everything_is_done() -> None:
    search, _ = searched(interaction=0.3)
    before = -1
    while not search.finished:
        done, total = search.progress()
        assert before <= done < total
        before = done
        search.round()
    done, total = search.progress()
    assert done == total
