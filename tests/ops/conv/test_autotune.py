"""The autotuner drops wrong candidates and remembers the fastest one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastprune.ops.conv import autotune
from fastprune.ops.conv.agreement import Candidate, Guarded, Problem
from fastprune.ops.conv.autotune import Autotuner
from fastprune.ops.conv.timing import time_calls

CPU = torch.device("cpu")
KEY = (("operator", "double"), ("shape", (3, 5)), ("dtype", "float32"))
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def right(results: Sequence[Tensor]) -> None:
    results[0].copy_(2 * X)


def a_little_off(results: Sequence[Tensor]) -> None:
    results[0].copy_(2 * X)
    results[0][1, 2] += 0.01


def incomplete(results: Sequence[Tensor]) -> None:
    results[0][:2].copy_(2 * X[:2])


def infinite(results: Sequence[Tensor]) -> None:
    results[0].copy_(2 * X)
    results[0][0, 0] = torch.inf


def beyond_the_end(results: Sequence[Tensor]) -> None:
    result = results[0]
    result.copy_(2 * X)
    result.as_strided((1,), (1,), result.storage_offset() + result.numel()).fill_(1)


def before_the_start(results: Sequence[Tensor]) -> None:
    result = results[0]
    result.copy_(2 * X)
    result.as_strided((1,), (1,), result.storage_offset() - 1).fill_(1)


def unsteady(results: Sequence[Tensor]) -> None:
    right(results)
    results[0][0, 0] += next(UNSTEADY) * 2.0**-20


UNSTEADY = itertools.count()


def failing(results: Sequence[Tensor]) -> None:
    raise RuntimeError("misaligned address")


def timer_of(milliseconds: dict[str, float]) -> Callable[..., list[float]]:
    """Return a timer that knows what each call takes; the call without a name is the fallback."""

    def timer(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
        for call in calls:
            call()
        return [milliseconds[getattr(getattr(call, "func", None), "__name__", "fallback")] for call in calls]

    return timer


def problem(*runs: Callable[[Sequence[Tensor]], None], unit: float = 2.0**-23) -> Callable[[], Problem]:
    return lambda: Problem(
        fallback=lambda: (X + X,),
        exact=lambda: (2 * X.double(),),
        candidates=[Candidate(run.__name__, run) for run in runs],
        unit=unit,
    )


def never() -> Problem:
    raise AssertionError("the choice is known")


def other(results: Sequence[Tensor]) -> None:
    right(results)


def test_the_fastest_wins():
    tuner = Autotuner(timer=timer_of({"fallback": 1.0, "right": 0.8, "other": 0.5}))
    assert tuner.choose(KEY, CPU, ("right", "other"), problem(right, other)) == "other"
    assert tuner.choose(KEY, CPU, ("right", "other"), never) == "other"


@pytest.mark.parametrize(("milliseconds", "winner"), [(0.96, "right"), (0.98, None), (1.5, None)])
def test_the_library_wins_unless_a_candidate_is_clearly_faster(milliseconds, winner):
    tuner = Autotuner(timer=timer_of({"fallback": 1.0, "right": milliseconds}))
    assert tuner.choose(KEY, CPU, ("right",), problem(right)) == winner


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (a_little_off, r"result 0 has an error of 0.01 .*, where .* is allowed"),
        (incomplete, r"result 0 has an error of nan"),
        (infinite, r"result 0 has an error of inf"),
        (beyond_the_end, "it wrote outside of result 0"),
        (before_the_start, "it wrote outside of result 0"),
        (unsteady, "result 0 has other bits on a second run"),
        (failing, "it failed with RuntimeError: misaligned address"),
    ],
)
def test_candidates_that_differ_are_dropped_and_named(wrong, message, tmp_path):
    tuner = Autotuner(tmp_path, timer=timer_of({"fallback": 1.0, "right": 0.9, wrong.__name__: 0.1}))
    with pytest.warns(
        RuntimeWarning, match=rf"kernel '{wrong.__name__}' is not used for .*'shape': \(3, 5\).*{message}"
    ):
        winner = tuner.choose(KEY, CPU, ("right", wrong.__name__), problem(right, wrong))
    assert winner == "right"
    (record,) = map(json.loads, (path.read_text() for path in tmp_path.glob("*.json")))
    assert list(record["dropped"]) == [wrong.__name__]
    assert wrong.__name__ not in record["milliseconds"]


def test_the_library_runs_where_all_candidates_are_wrong():
    tuner = Autotuner(timer=timer_of({}))
    with pytest.warns(RuntimeWarning, match="'failing' is not used"):
        assert tuner.choose(KEY, CPU, ("failing",), problem(failing)) is None


def test_rounding_of_the_dtype_is_allowed():
    def coarse(results: Sequence[Tensor]) -> None:
        results[0].copy_((2 * X).bfloat16())

    tuners = [Autotuner(timer=timer_of({"fallback": 1.0, "coarse": 0.5})) for _ in range(2)]
    assert tuners[0].choose(KEY, CPU, ("coarse",), problem(coarse, unit=2.0**-7)) == "coarse"
    with pytest.warns(RuntimeWarning, match="'coarse' is not used"):
        assert tuners[1].choose(KEY, CPU, ("coarse",), problem(coarse)) is None


def test_a_small_error_everywhere_is_refused():
    """Each element has a smaller error than the largest may have, but all have it."""
    ones = torch.cat([torch.full((999,), 1.0), torch.full((1,), 100.0)])

    def biased(results: Sequence[Tensor]) -> None:
        results[0].copy_(ones * 1.1)
        results[0][-1] = 100

    made = Problem(lambda: (ones,), lambda: (ones.double(),), [Candidate("biased", biased)], 2.0**-8)
    with pytest.warns(RuntimeWarning, match=r"'biased' is not used .* an error of 0.1 \(0.1 on average\)"):
        assert Autotuner(timer=timer_of({})).choose(KEY, CPU, ("biased",), lambda: made) is None


def test_every_result_is_checked():
    def second_is_wrong(results: Sequence[Tensor]) -> None:
        results[0].copy_(2 * X)
        results[1].copy_(4 * X)

    two = Problem(
        fallback=lambda: (2 * X, 3 * X),
        exact=lambda: (2 * X.double(), 3 * X.double()),
        candidates=[Candidate("second_is_wrong", second_is_wrong)],
        unit=2.0**-23,
    )
    with pytest.warns(RuntimeWarning, match="result 1 has an error"):
        assert Autotuner(timer=timer_of({})).choose(KEY, CPU, ("second_is_wrong",), lambda: two) is None


def test_results_keep_their_layout():
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    inside = Guarded(image).inside
    assert inside.stride() == image.stride()
    assert inside.isnan().all()
    assert inside.is_contiguous(memory_format=torch.channels_last)


def test_choices_outlive_the_process(tmp_path):
    times = {"fallback": 1.0, "right": 0.5}
    assert Autotuner(tmp_path, timer=timer_of(times)).choose(KEY, CPU, ("right",), problem(right)) == "right"
    assert Autotuner(tmp_path).choose(KEY, CPU, ("right",), never) == "right"
    slower = tuple((name, "other" if name == "operator" else value) for name, value in KEY)
    times["right"] = 2.0
    assert Autotuner(tmp_path, timer=timer_of(times)).choose(slower, CPU, ("right",), problem(right)) is None
    assert Autotuner(tmp_path).choose(slower, CPU, ("right",), never) is None


@pytest.mark.parametrize("change", ["key", "names", "environment", "module"])
def test_a_change_is_measured_again(change, tmp_path, monkeypatch):
    def tuner() -> Autotuner:
        return Autotuner(tmp_path, timer=timer_of({"fallback": 1.0, "right": 0.5, "other": 0.4}))

    assert tuner().choose(KEY, CPU, ("right",), problem(right)) == "right"
    key, names, run = KEY, ("right",), right
    facts = autotune.environment(CPU)
    if change == "key":
        key = (*KEY[:1], ("shape", (5, 3)), *KEY[2:])
    elif change == "names":
        names, run = ("other",), other
    else:
        name = "torch" if change == "environment" else change
        monkeypatch.setattr(autotune, "environment", lambda device: facts | {name: "another"})
    with pytest.raises(AssertionError, match="the choice is known"):
        tuner().choose(key, CPU, names, never)
    assert tuner().choose(key, CPU, names, problem(run)) == names[0]
    assert len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b'{"winner": "ri', "Unterminated string"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"[1, 2]", "it is not the record of a choice"),
        (b"{}", "it is not the record of a choice"),
        (b'{"winner": "right", "key": {}, "environment": {}}', "it was made for something else"),
        (None, "its winner 'rm -rf' is not a candidate"),
    ],
)
def test_a_damaged_file_is_measured_again(content, why, tmp_path):
    tuners = [Autotuner(tmp_path, timer=timer_of({"fallback": 1.0, "right": 0.5})) for _ in range(2)]
    tuners[0].choose(KEY, CPU, ("right",), problem(right))
    (path,) = tmp_path.glob("*.json")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"right",', b'"rm -rf",') if content is None else content)
    with pytest.warns(RuntimeWarning, match=f"ignored the remembered choice .*{why}"):
        assert tuners[1].choose(KEY, CPU, ("right",), problem(right)) == "right"
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    tuner = Autotuner(tmp_path / "file" / "autotune", timer=timer_of({"fallback": 1.0, "right": 0.5}))
    with pytest.warns(RuntimeWarning) as caught:
        assert tuner.choose(KEY, CPU, ("right",), problem(right)) == "right"
    assert any("cannot remember choices" in str(warning.message) for warning in caught)
    assert tuner.choose(KEY, CPU, ("right",), never) == "right"


def test_switched_off():
    tuner = Autotuner(enabled=False)
    assert tuner.choose(KEY, CPU, ("right",), never) is None
    assert Autotuner().choose(KEY, CPU, (), never) is None


@pytest.mark.parametrize("how", ["cudnn", "torch"])
def test_nothing_is_chosen_where_bits_must_repeat(how, monkeypatch):
    tuner = Autotuner(timer=timer_of({"fallback": 1.0, "right": 0.5}))
    assert tuner.choose(KEY, CPU, ("right",), problem(right)) == "right"
    if how == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert tuner.choose(KEY, CPU, ("right",), never) is None


def test_nothing_is_measured_at_a_bad_moment(tmp_path, monkeypatch):
    tuner = Autotuner(tmp_path, timer=timer_of({"fallback": 1.0, "right": 0.5}))
    monkeypatch.setattr(autotune, "is_busy", lambda device: True)
    assert tuner.choose(KEY, CPU, ("right",), never) is None
    monkeypatch.setattr(autotune, "is_busy", lambda device: False)
    assert tuner.choose(KEY, CPU, ("right",), problem(right)) == "right"  # the answer above was not remembered
    monkeypatch.setattr(autotune, "is_busy", lambda device: True)
    assert Autotuner(tmp_path).choose(KEY, CPU, ("right",), never) == "right"  # but a remembered choice is used


def test_tracing_is_a_bad_moment(monkeypatch):
    assert not autotune.is_busy(CPU)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert autotune.is_busy(CPU)


def test_without_memory_the_library_runs(tmp_path):
    def greedy(results: Sequence[Tensor]) -> None:
        raise torch.OutOfMemoryError

    tuner = Autotuner(tmp_path, timer=timer_of({}))
    with pytest.warns(RuntimeWarning, match="no memory to try kernels"):
        assert tuner.choose(KEY, CPU, ("greedy",), problem(greedy)) is None
    assert tuner.choose(KEY, CPU, ("greedy",), never) is None  # the library stays in this process
    assert not list(tmp_path.iterdir())  # and the next process tries again


def test_autocast_and_gradients_are_off_while_tuning():
    def fallback() -> Sequence[Tensor]:
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        return (2 * X,)

    made = Problem(fallback, lambda: (2 * X.double(),), [Candidate("right", right)], 2.0**-23)
    tuner = Autotuner(timer=timer_of({"fallback": 1.0, "right": 0.5}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tuner.choose(KEY, CPU, ("right",), lambda: made) == "right"


def test_real_times():
    small, large = torch.randn(8, 8), torch.randn(400, 400)
    slow, fast = time_calls([lambda: large @ large, lambda: small @ small], CPU)
    assert slow > fast > 0


@pytest.mark.parametrize(("value", "enabled"), [("0", False), pytest.param("1", True, marks=pytest.mark.slow)])
def test_the_environment_decides(value, enabled, tmp_path):
    code = "from fastprune.ops.conv.autotune import AUTOTUNER; print(AUTOTUNER.enabled, AUTOTUNER.folder)"
    variables = os.environ | {"FASTPRUNE_AUTOTUNE": value, "FASTPRUNE_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(enabled), str(tmp_path / "autotune")]


def choose_in_a_process(folder: Path, number: int) -> None:
    warnings.simplefilter("error")
    for repeat in range(20):
        key = (("repeat", repeat),)
        tuner = Autotuner(folder, timer=timer_of({"fallback": 1.0, "right": 0.5, "other": 0.5 + 0.2 * (number % 2)}))
        assert tuner.choose(key, CPU, ("right", "other"), problem(right, other)) in ("right", "other")


@pytest.mark.slow
def test_processes_may_tune_at_once(tmp_path):
    # By path: a child process cannot import this file, which belongs to no package.
    call = f"import runpy, pathlib; f = runpy.run_path({__file__!r})['choose_in_a_process']; "
    processes = [
        subprocess.Popen([sys.executable, "-c", f"{call}f(pathlib.Path({str(tmp_path)!r}), {number})"])
        for number in range(4)
    ]
    assert [process.wait() for process in processes] == [0] * 4
    files = list(tmp_path.iterdir())
    assert len(files) == 20
    assert all(json.loads(path.read_text())["winner"] in ("right", "other") for path in files)


def test_a_kernel_is_not_launched_first_in_a_capture(monkeypatch):
    """Its first launch loads it, which no capture allows."""
    captured = [True]
    monkeypatch.setattr(autotune, "is_captured", lambda device: captured[0])
    monkeypatch.setattr(autotune, "is_busy", lambda device: False)
    tuner = Autotuner(timer=timer_of({"fallback": 1.0, "right": 0.5}))
    assert tuner.choose(KEY, CPU, ("right",), problem(right)) is None
    captured[0] = False
    assert tuner.choose(KEY, CPU, ("right",), never) == "right"
    captured[0] = True
    assert tuner.choose(KEY, CPU, ("right",), never) == "right"
