"""Kernels are tried in another process: one that crashes or hangs costs that process and nothing else."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from fastprune.ops.conv import autotune
from fastprune.ops.conv.autotune import Autotuner
from fastprune.ops.conv.trial import Lines, Trials, serve

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
    with pytest.warns(RuntimeWarning, match="kernel 'wrong' is not used for .* has an error of"):
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
def test_a_kernel_that_fails_and_leaves_the_device_usable_ends_nothing(make: Make) -> None:
    trials = make()
    with pytest.warns(
        RuntimeWarning, match="'failing' is not used for .* it failed with RuntimeError: misaligned address"
    ):
        record = trials.tune(KEY, CPU, ["failing", "right"])
    assert record is not None
    assert record["winner"] == "right"
    assert trials._worker is not None


@pytest.mark.slow
@pytest.mark.parametrize("names", [["right", "poisoning"], ["poisoning", "right"], ["poisoning"]])
def test_an_illegal_access_costs_the_other_process(make: Make, names: list[str]) -> None:
    """It is an exception, after which nothing works on the device."""
    trials = make()
    with pytest.warns(
        RuntimeWarning, match="'poisoning' is not used for .* exit code 1: RuntimeError: an illegal memory"
    ):
        record = trials.tune(KEY, CPU, names)
    assert record is not None
    assert record["winner"] == ("right" if "right" in names else None)
    again = trials.tune(KEY, CPU, ["right"])
    assert again is not None
    assert again["winner"] == "right"


@pytest.mark.slow
def test_an_interrupted_question_is_not_answered_later(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = make()

    def interrupted(worker: object, seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        assert trials.tune(KEY, CPU, ["right"]) is not None
        patch.setattr(type(trials._worker), "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trials.tune(KEY, CPU, ["slow"])
    record = trials.tune(KEY, CPU, ["right"])
    assert record is not None
    assert set(record["milliseconds"]) == {"fallback", "right"}


@pytest.mark.slow
def test_a_process_that_has_ended_is_started_again(make: Make) -> None:
    trials = make()
    assert trials.tune(KEY, CPU, ["right"]) is not None
    assert trials._worker is not None
    trials._worker.process.kill()
    trials._worker.process.wait()
    assert trials.tune(KEY, CPU, ["right"]) is not None


def test_a_process_without_questions_ends() -> None:
    asks, questions = os.pipe()
    with os.fdopen(asks) as stream, os.fdopen(questions, "w") as idle:
        answers = io.StringIO()
        serve("trial_problems:make_problem", Lines(stream), answers, idle_seconds=0.1)
        assert answers.getvalue() == '{"ready": true}\n'
        idle.close()  # lets the thread that reads go


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
        RuntimeWarning, match="cannot try kernels for .* in another process: .*no_such_function.*the library runs"
    ):
        assert trials.tune(KEY, CPU, ["right"]) is None
    assert trials.tune(KEY, CPU, ["right"]) is None  # no warning
    assert trials._worker is None


@pytest.mark.slow
def test_a_device_for_one_process_alone_is_tried_once(make: Make) -> None:
    trials, key = make(), (("operator", "unusable"),)
    with pytest.warns(
        RuntimeWarning, match="cannot try kernels for .* devices are busy or unavailable; the library runs"
    ):
        assert trials.tune(key, CPU, ["right"]) is None
    assert trials.tune(KEY, CPU, ["right"]) is None  # no warning, and no process
    assert trials._worker is None


@pytest.mark.slow
def test_one_question_that_fails_spoils_no_other(make: Make) -> None:
    trials = make()
    assert trials.tune(KEY, CPU, ["right"]) is not None
    with pytest.warns(RuntimeWarning, match="the library runs"):
        assert trials.tune((("operator", "unusable"),), CPU, ["right"]) is None
    assert trials.tune(KEY, CPU, ["right"]) is not None


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
    monkeypatch.setattr(autotune, "is_captured", lambda device: False)
    trials = OnCPU("trial_problems:make_problem")
    tuner = Autotuner(trials=trials)

    def never() -> None:
        raise AssertionError("the other process makes the problem")

    assert tuner.choose(KEY, torch.device("cuda"), ("right",), never) == "right"
    trials.close()
