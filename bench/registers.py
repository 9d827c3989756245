"""Registers, spills and shared memory of every CUDA kernel, as ptxas prints them: no GPU is needed.

    python bench/registers.py [--only masked_act.cu …] [--json registers.json]

Compiles the sources with the flags of CMakeLists.txt, with CUTLASS if FASTPRUNE_CUTLASS_DIR names its headers, and the
choices of the Triton kernel (``--only triton_kernel.py``). Fails if a kernel spills. "blocks" is for how many blocks of
its threads (256, or those of the choice) a multiprocessor has registers.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[1]
REGISTERS, THREADS, MOST_THREADS = 65_536, 256, 2048
TRITON = "triton_kernel.py"
PATTERN = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one architecture.

    Args:
        source: the file.
        name: the function with its template's arguments.
        arch: the architecture.
        registers: of a thread.
        spilled: bytes that a thread stores to and loads from local memory for lack of registers.
        shared: shared memory in bytes; of CUTLASS's kernels without what they ask for at the launch.
        threads: of a block.
    """

    source: str
    name: str
    arch: str
    registers: int
    spilled: int
    shared: int
    threads: int = THREADS

    @property
    def blocks(self) -> int:
        """Blocks for which a multiprocessor has registers, which it gives out by 8, and places."""
        return min(REGISTERS // (-(-self.registers // 8) * 8 * self.threads), MOST_THREADS // self.threads)


def compile_commands(folder: str) -> Iterator[tuple[Path, list[str], str]]:
    """Yield the CUDA sources, each with the command that compiles it and the folder to run that in."""
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DFASTPRUNE_CUDA=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
         f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for entry in json.loads(Path(folder, "compile_commands.json").read_text()):
        if entry["file"].endswith(".cu"):
            yield Path(entry["file"]), shlex.split(entry["command"]), entry["directory"]


def kernels_of(source: Path, command: Sequence[str], folder: str) -> list[Kernel]:
    """Compile a source and return its kernels.

    Raises:
        RuntimeError: if it does not compile; with what the compiler says.
    """
    with tempfile.NamedTemporaryFile(suffix=".o") as file:
        command = [
            *command[: command.index("-o")],
            "-o",
            file.name,
            *command[command.index("-o") + 2 :],
            "-Xptxas",
            "-v",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile\n{done.stdout}{done.stderr}")
    text = subprocess.run(
        ["c++filt"], input=done.stdout + done.stderr, capture_output=True, text=True, check=True
    ).stdout
    found = []
    for entry, plain in zip(PATTERN.finditer(done.stdout + done.stderr), names_in(text), strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spilled = int(entry["stores"]) + int(entry["loads"])
        registers = int(entry["registers"])
        found.append(Kernel(source.name, plain, entry["arch"], registers, spilled, int(shared[1]) if shared else 0))
    return found


def names_in(text: str) -> list[str]:
    """Return the names of the kernels in ptxas's demangled output, without their arguments and namespaces."""
    text = re.sub(r"\w+::|\(anonymous namespace\)::", "", text)
    functions = re.findall(r"Compiling entry function '(?:void )?(.*)' for '\w+'", text)
    return [re.sub(r"\((?!\w+\)\d).*$", "", function) for function in functions]  # keeps (Sums)0


def main() -> int:
    """Print the table; the exit code says whether a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of sources; default: all")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    kernels: list[Kernel] = []
    if arguments.only != [TRITON]:
        with tempfile.TemporaryDirectory() as folder:
            for source, command, place in compile_commands(folder):
                if arguments.only is None or source.name in arguments.only:
                    kernels += kernels_of(source, command, place)
    if arguments.only is None or TRITON in arguments.only:
        from triton_registers import triton_registers

        kernels += [Kernel(TRITON, **facts) for facts in triton_registers()]
    print(f"{'registers':>9} {'spilled':>7} {'shared':>6} {'blocks':>6}  arch   kernel")
    for kernel in kernels:
        print(
            f"{kernel.registers:9} {kernel.spilled:7} {kernel.shared:6} {kernel.blocks:6}  {kernel.arch}  "
            f"{kernel.source}: {kernel.name}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1) + "\n")
    spilling = [kernel for kernel in kernels if kernel.spilled]
    print(f"{len(kernels)} kernels, {len(spilling)} of them spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
