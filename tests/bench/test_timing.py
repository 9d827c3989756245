"""The order of timed calls, and the statistics of their times."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastprune.bench.ceilings import Ceilings, last_cache
from fastprune.bench.timing import Clock, Timing, rotate_inputs, time_in_turns

CPU = torch.device("cpu")


def test_every_round_has_every_variant_and_begins_with_another() -> None:
    calls: list[str] = []

    def clock(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        function(*arguments)
        return float(len(calls))

    variants = {name: lambda x, name=name: calls.append(name) for name in "abc"}
    timings = time_in_turns(variants, lambda: (1,), clock, rounds=7, seconds=60)
    assert len(calls) == 3 * (7 + 3)  # three rounds to warm up
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert Counter(rounds) == {"abc": 4, "bca": 3, "cab": 3}
    assert timings["a"].seconds[:3] == (10, 15, 17)  # "a" is first, last and in the middle of its round


def test_slow_variants_get_fewer_rounds_but_five() -> None:
    variants = {"slow": lambda: time.sleep(0.01), "fast": lambda: None}
    timings = time_in_turns(variants, lambda: (), Clock(CPU), rounds=1000, seconds=0.0)
    assert {len(timing.seconds) for timing in timings.values()} == {5}
    assert timings["slow"].median >= 0.01 > timings["fast"].median


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = Timing((2.0, 20.0, 4.0, 6.0, 8.0)), Timing((1.0, 10.0, 2.0, 3.0, 4.0))
    assert slow.median / fast.median == 2
    assert slow.ratio_quartiles(fast) == (2, 2)  # though both drift by a factor of ten
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles == (2, 4)
    assert Timing((3.0,)).quartiles == (3, 3)


def test_inputs_take_turns_beyond_the_cache() -> None:
    draw = rotate_inputs(lambda: (torch.rand(250), [torch.rand(250)]), cache_bytes=5000)  # 2000 bytes a set
    seen = [draw() for _ in range(12)]
    assert len({id(values[0]) for values in seen}) == 6
    assert [id(values[0]) for values in seen[:6]] == [id(values[0]) for values in seen[6:]]


def test_a_cold_clock_writes_over_the_cache_before_it_starts() -> None:
    clock = Clock(CPU, flush=1 << 20)
    clock.scratch.zero_()
    seen = []
    clock(lambda: seen.append(int(clock.scratch[-1])), ())
    clock(lambda: seen.append(int(clock.scratch[-1])), ())
    assert seen == [1, 2]


def test_ceilings_of_this_machine() -> None:
    ceilings = Ceilings.measure(CPU, quick=True)
    assert 1e8 < ceilings.bandwidth < 1e13
    assert 1e8 < ceilings.rate("float32") < 1e14
    assert 0 < ceilings.overhead < 1e-2
    assert ceilings.least_seconds(ceilings.bandwidth, 0, "float32") == pytest.approx(1)
    assert ceilings.least_seconds(1, 2 * ceilings.rate("float32"), "float32") == pytest.approx(2)
    assert ceilings.describe()["matmul_flops_per_second"] == {"float32": ceilings.rate("float32")}
    with pytest.raises(ValueError, match="precision 'int8': needs one of float64"):
        ceilings.rate("int8")
    assert torch.get_float32_matmul_precision() == "highest"
    assert 1 << 18 <= last_cache(CPU) <= 1 << 32
