"""The script that checks a GPU machine: its steps, tried out on the CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_steps
import pytest
from gpu_steps import Run, Step

from fastprune.ops.conv import fused

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("script", ["gpu_check.sh", "gpu_wheelhouse.sh", "sources.sh"])
def test_it_reads_well(script: str) -> None:
    subprocess.run(["bash", "-n", str(BENCH / script)], check=True)


def program(name: str, code: str, seconds: float = 60.0, *, has_numbers: bool = False) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds, has_numbers=has_numbers)


def test_a_step_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "found.json", 60.0)
    writes = "import sys; open(sys.argv[2], 'w').write('[1]'); sys.exit(3)"
    run.run_group([program("first", "print('hello')"), program("second", writes, has_numbers=True)])
    run.run_group([program("third", "")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))}
    assert {name: row["code"] for name, row in rows.items()} == {"first": 0, "second": 3, "third": 0}
    assert rows["second"]["numbers"] == [1]
    assert run.failures() == ["second: FAILED (3)"]
    out = capsys.readouterr().out
    assert "=== first: ok" in out
    assert "hello" in out


def test_what_has_no_time_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path / "found.json", 1.0)
    run.run_group([program("late", "")])
    assert run.failures() == ["late: LEFT OUT"]


@pytest.mark.slow
def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    run = Run(tmp_path / "found.json", 60.0)
    writes = "import sys, time; open(sys.argv[2], 'w').write('[1]'); time.sleep(600)"
    run.run_group([program("hangs", writes, seconds=5.0, has_numbers=True)])
    assert run.failures() == ["hangs: OUT OF TIME"]
    assert run.rows[0]["numbers"] == [1]


class Selected:
    """The names of the tests that pytest selects, as a plugin of it."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.name for item in session.items]


def names_of_tests(*selection: str) -> list[str]:
    """Return the names of the GPU tests that pytest selects."""
    selected = Selected()
    folder = BENCH.parent
    options = [f"--rootdir={folder}", f"--config-file={folder / 'pyproject.toml'}", "--collect-only", "-q", "-m", "gpu"]
    file, *others = selection
    code = pytest.main([*options, "-p", "no:cacheprovider", str(folder / file), *others], plugins=[selected])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return selected.names


@pytest.mark.parametrize("kernel", gpu_steps.MEMCHECK)
def test_a_selection_selects_tests(kernel: str) -> None:
    if kernel == "conv/fused_cuda" and not fused.kernels_of_this_build():
        pytest.skip("this build has no fused convolutions")
    assert names_of_tests(gpu_steps.file_of(kernel), "-k", gpu_steps.MEMCHECK[kernel])
    assert not names_of_tests(gpu_steps.file_of(kernel), "-k", "no_such_test")


def test_every_test_of_fused_convolutions_is_in_one_family() -> None:
    names = names_of_tests("tests/ops/conv/test_fused_cuda.py")
    assert len(names) > 10
    for name in names:
        assert len([family for family in gpu_steps.FAMILIES if selects(family, name)]) == 1, name


def selects(expression: str, name: str) -> bool:
    """Return what pytest's -k makes of an expression of ``and`` and ``not``."""
    terms = [term.split() for term in expression.split(" and ")]
    return all((words[-1] in name) is (len(words) == 1) for words in terms)


@pytest.mark.slow
def test_a_step_is_profiled(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    program = [sys.executable, str(BENCH / "profile_step.py"), "--device", "cpu", "--quick", "--json", str(file)]
    subprocess.run(program, check=True, capture_output=True, cwd=tmp_path)
    steps = json.loads(file.read_text(encoding="utf-8"))["steps"]
    assert set(steps) == {"fastprune", "eager"}
    for step in steps.values():
        assert 0 < step["host_ms"] <= step["step_ms"]
        assert sum(row["ms"] for row in step["kernels"]) > 0


@pytest.mark.parametrize("part", sorted(gpu_steps.SECONDS))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_are_unique(part: str, device: str) -> None:
    groups = getattr(gpu_steps, part)(device)
    names = [step.name for group in groups for step in group]
    assert len(names) == len(set(names))
