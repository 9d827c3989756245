"""Run the steps of ``gpu_check.sh``: each a program of its own, so that one that hangs or crashes costs only itself.

    python bench/gpu_steps.py tests|speed|triton --device cuda --json FILE

The document is written after each step: its exit code, its seconds, and the numbers that it wrote so far if it is a
benchmark, even where its time was over. Exits with the number of steps that failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = {"tests": 280, "speed": 420, "triton": 240}
TOGETHER = 6
"""Test programs that run at once."""

FAMILIES = (
    "bfloat16 and sm80",
    "float16 and sm80 and not bfloat16",
    "float32 and sm80",
    "bfloat16 and sm90 and 1x1",
    "bfloat16 and sm90 and not 1x1",
    "float16 and sm90 and 1x1 and not bfloat16",
    "float16 and sm90 and not 1x1 and not bfloat16",
    "not sm80 and not sm90",
)
"""Tests of the fused convolutions of one source file, as pytest selects them, and those of the rest."""

WITHOUT_TRITON = ("FASTPRUNE_TRITON=0",)

MEMCHECK = {
    "topk_mask": "test_values_of_every_size and (normal or ties) and (33 or 2049 or 16385)",
    "group_prox": "test_values_of_every_layout and (shape1- or shape3- or shape8- or shape9- or shape10-)",
    "masked_act": "test_values and dtype0",
    "channel_moments": "dtype0",
    "bernoulli_gate": "test_same_bits_everywhere and (5-dtype0 or 40001-dtype0)",
    "gumbel_gate": "test_same_bits_everywhere and (5-dtype0 or 40001-dtype0)",
    "conv/fused_cuda": "test_values and seed0",
    "conv/triton_conv": "relu- and dtype1",
}
"""Tests of each kernel's corners for compute-sanitizer: sizes that fit into shared memory and sizes that do not."""


@dataclass(frozen=True)
class Step:
    """A program.

    Args:
        name: what the log calls it.
        command: the program and its arguments.
        seconds: the time that it gets at most.
        has_numbers: whether it takes ``--json FILE``.
        environment: assignments ``NAME=value`` for it.
    """

    name: str
    command: Sequence[str]
    seconds: float
    has_numbers: bool = False
    environment: Sequence[str] = ()


def tests(device: str) -> list[list[Step]]:
    """Return the steps of the first call: groups that run after each other, steps of a group together."""
    on_cuda = device == "cuda"
    # Warnings of another torch than ours are shown and are no errors.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default",
              "-m", "gpu" if on_cuda else "not slow and not gpu"]  # fmt: skip
    files = sorted(
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/*/**/test_*.py")
        if "mark.gpu" in path.read_text("utf-8")
    )
    fused = files.pop(files.index("tests/ops/conv/test_fused_cuda.py"))
    groups = [
        [Step("doctor", [sys.executable, "-m", "fastprune", "doctor"], 60)],
        [Step(Path(file).stem, [*pytest, file], 100) for file in files],
    ]
    if on_cuda:
        groups.append([Step(f"fused_conv, {family}", [*pytest, fused, "-k", family], 80) for family in FAMILIES])
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        groups.append([
            Step(
                f"{tool}, {name}",
                [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, file_of(name), "-k", selection],
                60,
                environment=("PYTORCH_NO_CUDA_MEMORY_CACHING=1",),  # otherwise tensors share their bounds
            )
            for tool in ("memcheck", "racecheck")
            for name, selection in MEMCHECK.items()
        ])  # fmt: skip
    quick = [] if on_cuda else ["--quick"]
    for kernel in ("topk_mask", "gates", "group_prox", "masked_bn_act", "masked_conv_bn_act"):
        bench = ["kernels", "--only", kernel, "--no_compile", "--seconds", "8", *quick]
        groups.append([bench_step(f"bench {kernel}", 20, device, *bench)])
    return groups


def file_of(kernel: str) -> str:
    """Return the file of a kernel's tests."""
    folder, _, name = f"tests/ops/{kernel}".rpartition("/")
    return f"{folder}/test_{name}.py"


def speed(device: str) -> list[list[Step]]:
    """Return the steps of the second call, the most important ones first."""
    quick = [] if device == "cuda" else ["--quick"]
    profile = [sys.executable, str(ROOT / "bench" / "profile_step.py"), "--device", device, *quick]
    return [
        [Step("doctor", [sys.executable, "-m", "fastprune", "doctor"], 60)],
        [bench_step("step ResNet-50", 90, device, "step", "--only", "ResNet-50", "--no_compile", *quick)],
        [Step("profile", profile, 40, has_numbers=True, environment=WITHOUT_TRITON)],
        [bench_step("search ddnp", 70, device, "search", "--only", "ddnp", *quick)],
        [bench_step("step ResNet-50, compiled", 200, device, "step", "--only", "ResNet-50", *quick)],
        [bench_step("step ResNet-56", 40, device, "step", "--only", "ResNet-56", "--no_compile", *quick)],
        [bench_step("masked_conv_bn_act, compiled", 60, device, "kernels", "--only", "masked_conv_bn_act", *quick)],
    ]


def triton(device: str) -> list[list[Step]]:
    """Return the step of the third call: kernels of Triton are compiled and tried, then a step is timed."""
    quick = [] if device == "cuda" else ["--quick"]
    step = bench_step("step ResNet-50 with Triton", 230, device, "step", "--only", "ResNet-50", "--no_compile", *quick)
    return [[replace(step, environment=())]]


def bench_step(name: str, seconds: float, device: str, *arguments: str) -> Step:
    """Return the step of a benchmark, without Triton, whose kernels take longer to compile than all that is timed."""
    command = [sys.executable, "-m", "fastprune", "bench", *arguments, "--device", device]
    return Step(name, command, seconds, has_numbers=True, environment=WITHOUT_TRITON)


class Run:
    """The results so far.

    Args:
        path: file of the document.
        seconds: time that is left.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.deadline = path, time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []

    def run(self, step: Step, folder: Path) -> tuple[dict[str, Any], str]:
        """Run one step; return its row and its output."""
        numbers = folder / f"{step.name.replace('/', ' ')}.json"
        began = time.monotonic()
        seconds = min(step.seconds, self.deadline - began)
        row: dict[str, Any] = {"name": step.name, "code": None, "seconds": 0.0}
        if seconds < 5:
            return row, "left out: the time is over\n"
        command = [*step.command, "--json", str(numbers)] if step.has_numbers else step.command
        log = folder / f"{numbers.stem}.log"
        with log.open("w") as file:
            # timeout ends the children too.
            whole = ["env", *step.environment, "timeout", "--kill-after=5", f"{seconds:.0f}", *command]
            row["code"] = subprocess.run(whole, stdout=file, stderr=subprocess.STDOUT, check=False, cwd=ROOT).returncode
        row["seconds"] = round(time.monotonic() - began, 1)
        if numbers.exists():
            row["numbers"] = json.loads(numbers.read_text(encoding="utf-8"))
        return row, log.read_text(encoding="utf-8", errors="replace")

    def run_group(self, steps: Sequence[Step]) -> None:
        """Run steps together; write the document after each."""
        with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(TOGETHER) as pool:
            for future in as_completed([pool.submit(self.run, step, Path(name)) for step in steps]):
                row, output = future.result()
                self.rows.append(row)
                self.path.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                print(f"=== {row['name']}: {outcome(row['code'])}, {row['seconds']} s\n{output[-6000:]}", flush=True)

    def failures(self) -> list[str]:
        """Return a line for each step that failed."""
        return [f"{row['name']}: {outcome(row['code'])}" for row in self.rows if row["code"] not in (0, 5)]


def outcome(code: int | None) -> str:
    """Say in a word how a program ended; pytest's 5 says that no test was selected."""
    known = {None: "LEFT OUT", 0: "ok", 5: "no tests", 124: "OUT OF TIME", 137: "OUT OF TIME"}
    return known.get(code, f"FAILED ({code})")


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(SECONDS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--used", type=float, default=0.0, help="seconds of this call that are over already")
    arguments = parser.parse_args()
    run = Run(arguments.json, SECONDS[arguments.part] - arguments.used)
    for steps in {"tests": tests, "speed": speed, "triton": triton}[arguments.part](arguments.device):
        run.run_group(steps)
    failures = run.failures()
    print("\n".join([f"=== {len(failures)} of {len(run.rows)} step(s) failed", *failures]))
    sys.exit(len(failures))


if __name__ == "__main__":
    main()
