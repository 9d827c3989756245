"""Kernels are tried in another process: one that crashes or hangs costs that process and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fastprune.ops.conv import autotune
from fastprune.ops.conv.autotune import Autotuner
from fastprune.ops.conv.trial import Trials

CPU = torch.device("cpu")
KEY = (("operator", "double"), ("shape", (3, 5)))
Make = Callable[..., Trials]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Trials] = []

    def function(problems: str = "trial_problems:make_problem", **options: float) -> Trials:
        made.append(Trials(problems, **options))
        return made[-1]

    yield function
    for trials in made:
        trials.close()


def test_one_process_tries_all(make: Make) -> None:
    trials = make()
    record = trials.tune(KEY, CPU, ["right", "wrong", "talking"])
    assert record is not None
    assert record["winner"] in ("right", "talking")
    assert list(record["dropped"]) == ["wrong"]
    assert "has an error of" in record["dropped"]["wrong"]
    assert record["milliseconds"]["fallback"] > 1
    assert trials._worker is not None
    process = trials._worker.process
    assert trials.tune(KEY, CPU, ["right"]) is not None
    assert trials._worker.process is process


def test_a_crash_costs_the_other_process(make: Make) -> None:
    trials = make()
    with pytest.warns(
        RuntimeWarning, match="kernel 'crashing' is not used for .* it ended with exit code -6: an illegal"
    ):
        record = trials.tune(KEY, CPU, ["crashing", "right"])
    assert record is not None
    assert record["winner"] == "right"
    assert record["dropped"]["crashing"].endswith("an illegal memory access was encountered")


@pytest.mark.slow
def test_a_kernel_that_hangs_is_given_up(make: Make) -> None:
    with pytest.warns(RuntimeWarning, match="kernel 'hanging' is not used for .* no answer in 3 seconds"):
        record = make(seconds=3.0).tune(KEY, CPU, ["right", "hanging"])
    assert record is not None
    assert record["winner"] == "right"


@pytest.mark.slow
def test_a_process_that_does_not_start_is_not_started_again(make: Make) -> None:
    trials = make("trial_problems:no_such_function")
    with pytest.warns(
        RuntimeWarning, match="cannot try kernels in another process: .*no_such_function.*the library runs"
    ):
        assert trials.tune(KEY, CPU, ["right"]) is None
    assert trials.tune(KEY, CPU, ["right"]) is None  # no warning
    assert trials._worker is None


@pytest.mark.slow
def test_what_is_too_large_leaves_the_process_alone(make: Make) -> None:
    trials = make()
    with pytest.warns(RuntimeWarning, match="the device has no memory for it; the library runs"):
        assert trials.tune((("operator", "too large"),), CPU, ["right"]) is None
    assert trials.tune(KEY, CPU, ["right"]) is not None


@pytest.mark.slow
def test_the_tuner_asks_it_on_cuda(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials get another device than the tuner here, as this machine may have none."""

    class OnCPU(Trials):
        def tune(self, key, device, names):
            assert device.type == "cuda"
            return super().tune(key, CPU, names)

    monkeypatch.setattr(autotune, "environment", lambda device: {})
    monkeypatch.setattr(autotune, "is_busy", lambda device: False)
    trials = OnCPU("trial_problems:make_problem")
    tuner = Autotuner(trials=trials)

    def never() -> None:
        raise AssertionError("the other process makes the problem")

    assert tuner.choose(KEY, torch.device("cuda"), ("right",), never) == "right"
    trials.close()
