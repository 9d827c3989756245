"""Registers, spills and shared memory of Triton's kernels in all choices of blocks: a part of ``registers.py``.

Triton compiles for a GPU that is not there. The choices are those of the autotuner; each with everything in its
epilogue, for windows of 3x3 (depthwise 5x5) and sizes that are multiples of 16, as most layers are.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastprune.ops.conv.triton_conv import BAND, DEPTHWISE, HALF, TF32, TritonKernel
from fastprune.ops.conv.triton_kernel import conv_kernel, depthwise_kernel

ARCHITECTURES = (80, 90)
IMAGES = ("x", "w", "y", "second", "added")
VECTORS = ("scale", "shift", "mask", "sums")


def triton_registers() -> Iterator[dict[str, Any]]:
    """Yield name, architecture, registers, spilled bytes and shared memory of each choice.

    Raises:
        RuntimeError: under Triton's interpreter, which compiles nothing.
    """
    if not isinstance(conv_kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET=1: Triton's interpreter compiles nothing; unset it")
    for arch in ARCHITECTURES:
        for dtype, kernels in (("bf16", HALF), ("fp32", TF32)):
            for kernel in (*kernels, *DEPTHWISE):
                for backward in (False, True):
                    name = f"{dtype}, {kernel.name}, {'backward' if backward else 'forward'}"
                    yield {"name": name, "arch": f"sm_{arch}", "threads": 32 * kernel.warps,
                           **compile_choice(kernel, dtype, arch, backward=backward)}  # fmt: skip


def compile_choice(kernel: TritonKernel, dtype: str, arch: int, *, backward: bool) -> dict[str, int]:
    """Compile one choice and return what ptxas says."""
    window = 3 if kernel.depth else 5  # whose taps are all unrolled
    constants: dict[str, Any] = {
        "TAPS_H": window, "TAPS_W": window, "BACKWARD": backward, "ACTIVATION": "relu", "SAVES_ARGUMENT": False,
        "HAS_SECOND": True, "HAS_SCALE": not backward, "HAS_SHIFT": not backward, "HAS_MASK": True, "HAS_ADDED": True,
        "HAS_SUMS": backward, "BLOCK_ROWS": kernel.rows, "BLOCK_COLUMNS": kernel.columns,
    }  # fmt: skip
    function = conv_kernel if kernel.depth else depthwise_kernel
    if kernel.depth:
        constants |= {
            "PRECISION": "tf32",
            "WIDENS": False,
            "BLOCK_DEPTH": kernel.depth,
            "BAND": BAND,
        }
        constants["w_column" if backward else "w_depth"] = 1
    types = dict.fromkeys(IMAGES, f"*{dtype}") | dict.fromkeys(VECTORS, "*fp32")
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = {*IMAGES, *VECTORS, "columns", "depth"} | {
        name for name in names if re.match(r"(x|w|y|second|added)_" if kernel.depth else r"(x|y|second|added)_", name)
    }
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name in divisible and name not in constants
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        target = f"-arch=sm_{arch}{'a' if arch >= 90 else ''}"
        said = subprocess.run(
            [ptxas, "-v", target, file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    numbers = [
        re.search(pattern, said) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill st", r"(\d+) bytes spill lo")
    ]
    registers, stores, loads = (int(number[1]) if number else 0 for number in numbers)
    return {"registers": registers, "spilled": stores + loads, "shared": compiled.metadata.shared}
