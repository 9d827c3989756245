"""Ctrl-C: exit code 130 and no traceback, whenever it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastprune.cli.main import main
from fastprune.host.signals import Interrupts

LINE = "prune --model resnet20 --data synthetic:3x8x8:4:128 --device cpu --method"


def interrupted(line: str, when: str) -> tuple[int, str]:
    """Send Ctrl-C to a command and its processes when a text occurs among the files that it has mapped."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastprune", *line.split()], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while when not in maps.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="finds the moment in /proc")
@pytest.mark.parametrize("when", ["libtorch_cpu", "fastprune/_C"])
def test_while_modules_are_imported(when: str, tmp_path: Path) -> None:
    code, err = interrupted(f"{LINE} l1 --out {tmp_path}/run", when)
    assert (code, err.strip()) == (130, "fastprune: interrupted")
    assert not (tmp_path / "run").exists()


def test_an_interrupt_that_became_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trace(*arguments: object, **options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("the exporter failed") from None

    monkeypatch.setattr("fastprune.job.trace", trace)
    before = signal.getsignal(signal.SIGINT)  # ignored in a job of a shell's background
    assert main(f"{LINE} l1 --out {tmp_path}/run".split()) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fastprune: interrupted"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_resume_command_is_told_where_something_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fastprune.job.cut", cut)
    assert main([*f"{LINE} l1 --out".split(), str(tmp_path / "a run")]) == 130
    told = f"fastprune: interrupted: fastprune prune --out '{tmp_path}/a run' --resume"
    assert capsys.readouterr().err.splitlines()[-1] == told


def test_an_interrupt_lost_in_a_destructor_ends_the_process() -> None:
    script = """
import signal
from fastprune.host.signals import Interrupts
class Odd:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
with Interrupts() as interrupts:
    interrupts.has_work = True
    odd = Odd()
    del odd
    print("went on")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "fastprune: interrupted")


def test_the_first_interrupt_raises_once_there_is_work() -> None:
    with Interrupts() as interrupts:
        interrupts.has_work = True
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.came


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [5, 7])
def test_workers_of_sp_print_nothing(seconds: float, tmp_path: Path) -> None:
    options = (
        "--sp.adaptor trained --sp.epochs 1 --sp.batch_size 16 --sp.population 8 --sp.iterations 30 --sp.images 12 "
        "--sp.workers 2"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "fastprune", *f"{LINE} sp {options} --out {tmp_path}/run".split()],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "fastprune: " in err.splitlines()[-1]
